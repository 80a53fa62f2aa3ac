"""The packages beyond the emoji, pinned: sets of icons from npm, and Open Clipart as Debian packages it."""

import pathlib

from emoji_data.packages import Package

from picture_data.debian import DebianPackage

ICONS = {
    "fxemoji": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "circle-flags": Package(
        "@iconify-json/circle-flags",
        "1.2.11",
        "sha512-vrx2btOkTQ4/P75ElEDnjXShmNTwInXuhhpIQQ6U6YUTdxfWyvm/4ijNG8FX8iWFr+sqqQRCvXpm2RfRtjVXfg==",
    ),
    "flat-color-icons": Package(
        "@iconify-json/flat-color-icons",
        "1.2.3",
        "sha512-KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
    ),
    "meteocons": Package(
        "@iconify-json/meteocons",
        "1.2.4",
        "sha512-E7YV02ql5WmJgAOpXU/hoF9Mdshq73KjwR6fBxZ5SrqMJghMa3CIcRG6NQGwP4I1uBOhIjOFlAikYoPAKuT56A==",
    ),
    "fluent-color": Package(
        "@iconify-json/fluent-color",
        "1.2.21",
        "sha512-VETjGx7BMpVsCR3HV5g5t6oBGZ92XKzIRClS5xUvDn1YHAkQTF9OyF/aFdtxYOC8JROoI1SNO/Ql6jZeK7mroA==",
    ),
}
CLIPART = DebianPackage(
    "openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
)
TABLES = pathlib.Path(__file__).parent  # where the labels lie, as *.tsv
