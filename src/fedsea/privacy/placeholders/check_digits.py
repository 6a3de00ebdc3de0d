"""Check digits of bank accounts and cards."""

from __future__ import annotations

import re


def iban_is_valid(text: str) -> bool:
    """Whether the check digits of an IBAN are right (ISO 13616: modulo 97 leaves 1)."""
    compact = re.sub(r"\s", "", text).upper()
    if not re.fullmatch(r"[A-Z]{2}\d{2}[A-Z0-9]{11,30}", compact):
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def luhn(number: str) -> bool:
    """Whether the digits end in the check digit of ISO/IEC 7812-1 (Luhn)."""
    digits = [int(char) for char in reversed(number) if char.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0
