"""The one exception for what a user can mend."""


class ContractError(ValueError):
    """An argument breaks the contract. The message names the argument, what it is and what is allowed.

    Raised before any launch or collective, so that nothing is half done. Usual causes: shapes that disagree, a dtype or
    device that is not accepted, ids out of range, a combination of options that no model uses.
    """


def check(condition: bool, message: str) -> None:
    """Raise ContractError(message) unless condition holds."""
    if not condition:
        raise ContractError(message)


def known(what: str, value: str, table: object) -> None:
    """Raise ContractError unless value is one of the names in table, listing them."""
    names = list(table)  # type: ignore[call-overload]
    check(value in names, f"{what} '{value}' is not known; allowed: {', '.join(map(str, names))}")
