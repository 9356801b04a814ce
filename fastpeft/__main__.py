from fastpeft.cli import main

main()
