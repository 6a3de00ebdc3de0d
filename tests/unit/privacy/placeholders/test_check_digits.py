from __future__ import annotations

from fedsea.privacy.placeholders.check_digits import iban_is_valid, luhn


def test_check_digits():
    """IBAN modulo 97 and Luhn tell a wrong digit."""
    assert iban_is_valid("GB82 WEST 1234 5698 7654 32")
    assert not iban_is_valid("GB82 WEST 1234 5698 7654 33")
    assert not iban_is_valid("nonsense")
    assert luhn("4111 1111 1111 1111")
    assert not luhn("4111 1111 1111 1112")


def test_luhn_of_odd_digits():
    """Digits of other scripts count, signs that only look like digits do not."""
    assert luhn("٤١١١ ١١١١ ١١١١ ١١١١")
    assert luhn("²")
