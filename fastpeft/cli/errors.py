class BadInput(Exception):
    """The user gave something that cannot work: shown as one line on stderr, exit code 2, nothing written."""


def one_line(error: BaseException) -> str:
    """The first line of a library's message, which may run over half a screen."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()
