"""How a stage tells people what it is doing: one plain line a step, on standard output."""


def say(text: str) -> None:
    """Tell one step."""
    print(text, flush=True)
