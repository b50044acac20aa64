FACTS: dict[str, str]
LEVELS: list[str]
