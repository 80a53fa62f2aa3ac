"""The one colour that a picture on white mostly has."""

import numpy as np

_SHARE = 0.6  # of what a picture shows that its colour must have
_SHARE_OF_GRAY = 0.85
_HUES = (  # upper end in degrees, colour
    (15, "red"), (42, "orange"), (68, "yellow"), (180, "green"), (255, "blue"), (295, "purple"), (340, "pink"),
    (361, "red"),
)  # fmt: skip


def main_colour(pixels: np.ndarray) -> str | None:
    """The colour's name, or None if there is no such colour.

    Args:
        pixels: uint8 [side, side, 3], on white.
    """
    shown = pixels.reshape(-1, 3)[pixels.reshape(-1, 3).min(-1) < 235].astype(np.float64) / 255
    if len(shown) < 0.03 * pixels.shape[0] ** 2:
        return None
    high, low = shown.max(-1), shown.min(-1)
    spread = high - low
    red, green, blue = shown.T
    safe = np.maximum(spread, 1e-9)
    hue = np.select(
        [high == red, high == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    names = np.array([name for _, name in _HUES])[np.searchsorted([end for end, _ in _HUES], hue * 60, side="right")]
    names = np.where((hue > 0.1) & (hue < 0.75) & (high < 0.7), "brown", names)
    names = np.where(spread < 0.35 * high, "", names)  # pale colours have no clear name
    names = np.where(spread < 0.12, "gray", names)
    names = np.where(high < 0.2, "black", names)
    found, counts = np.unique(names, return_counts=True)
    best = counts.argmax()
    # Shades and outlines are gray and black, too.
    share = _SHARE_OF_GRAY if found[best] in ("gray", "black") else _SHARE
    return str(found[best]) if found[best] and counts[best] >= share * len(shown) else None
