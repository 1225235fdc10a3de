"""What computing costs: seconds of some processes, and what an hour of one of them is charged. Any currency."""

from __future__ import annotations

from teacher_cache.errors import SettingsError


def price_of(seconds: float, price_per_hour: float | None, processes: int = 1) -> float | None:
    """What so much time of some processes costs; None where no price is given."""
    return None if price_per_hour is None else seconds / 3600 * price_per_hour * processes


def check_price(price_per_hour: float | None) -> None:
    """Refuse what is no price.

    Raises:
        SettingsError: it is negative, infinite or none at all.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise SettingsError(
            f"--price-per-hour {price_per_hour!r} is no price: give what an hour of one process costs, such as 2.5"
        )
