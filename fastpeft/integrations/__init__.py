"""What fastpeft knows of other packages: peft's modules, bitsandbytes' storage, transformers' attention."""
