"""placeholder"""


def chat(target: str) -> None:
    "x"
