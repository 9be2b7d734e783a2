"""Write command lines to copy: what resumes or repeats a run."""

from infra.redaction import redact


def command_line(words: list[str], **options: str | float | bool | tuple[str, ...] | None) -> str:
    """Return a command line to copy, without credentials; options that are None, False or empty are left out."""
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words = [*words, flag]
        elif value is not None and value is not False:
            values = value if isinstance(value, tuple) else (value,)
            words = [*words, *(word for one in values for word in (flag, _word(one)))]
    return redact(words)


def _word(value: str | float) -> str:
    if isinstance(value, str):
        return value
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
