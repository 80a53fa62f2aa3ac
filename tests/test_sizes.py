"""Picture sizes: golden cases and properties."""

import math

import pytest
from conftest import golden_json
from hypothesis import assume, given
from hypothesis import strategies as st

from emu3_jax.errors import Emu3Error
from emu3_jax.media.sizes import area_resize, generate_size, least_area, smart_resize

LIMITS = {"factor": 8, "min_pixels": 512 * 512, "max_pixels": 1024 * 1024}


@pytest.mark.parametrize("height, width, expected", golden_json("smart_resize.json"))
def test_smart_resize_equals_reference(height, width, expected):
    if expected == "error":
        with pytest.raises(Emu3Error, match=r"too small|too elongated"):
            smart_resize(height, width, **LIMITS)
    else:
        assert list(smart_resize(height, width, **LIMITS)) == expected


@given(height=st.integers(8, 20_000), elongation=st.floats(0.2, 5), factor=st.sampled_from([2, 4, 8, 16]))
def test_smart_resize_keeps_grid_area_and_shape(height, elongation, factor):
    width = round(height * elongation)
    assume(min(height, width) >= factor and max(height, width) <= 5 * min(height, width))
    low, high = 512 * 512, 1024 * 1024
    rows, columns = (side / factor for side in smart_resize(height, width, factor, low, high))
    assert rows == int(rows) and columns == int(columns)
    assert low <= rows * columns * factor**2 <= high
    # Each side is rounded to the grid once, by less than one step.
    assert (columns - 1) / (rows + 1) < width / height < (columns + 1) / (rows - 1)


@given(height=st.integers(64, 128), width=st.integers(64, 128))
def test_smart_resize_rounds_to_even_within_the_limits(height, width):
    expected = tuple(8 * round(side / 8) for side in (height, width))
    assert smart_resize(height, width, 8, 1, 10**6) == expected
    assert smart_resize(*expected, 8, 1, 10**6) == expected


@pytest.mark.parametrize(
    "height, width, message",
    [
        (7, 100, "100x7 pixels is too small: each side must have at least 8"),
        (100, 501, "501x100 pixels is too elongated: at most 5:1"),
        (0, 0, "too small"),
    ],
)
def test_smart_resize_errors(height, width, message):
    with pytest.raises(Emu3Error, match=message):
        smart_resize(height, width, **LIMITS)


def test_limits_that_leave_nothing():
    assert smart_resize(100, 500, 8, 1, 320) == (8, 40)
    with pytest.raises(Emu3Error, match=r"max_pixels 319 is too small for .* at least 320"):
        smart_resize(100, 500, 8, 1, 319)


@pytest.mark.parametrize("ratio, area, expected", golden_json("text.json")["generate_size"])
def test_generate_size_equals_reference(ratio, area, expected):
    assert list(generate_size(ratio, area)) == expected


sides = st.integers(1, 99)


@given(width=sides, height=sides, area=st.integers(4096, 2**22), factor=st.sampled_from([4, 8]))
def test_generate_size_keeps_area_and_ratio(width, height, area, factor):
    assume(max(width, height) <= 5 * min(width, height))
    rows, columns = generate_size(f"{width}:{height}", area, factor)
    assert abs(rows - math.sqrt(area * height / width) / factor) < 0.51
    assert abs(columns - math.sqrt(area * width / height) / factor) < 0.51
    assert generate_size(f"{height}:{width}", area, factor) == (columns, rows)


@given(ratio=st.text(alphabet="0123456789: x-.", max_size=8), area=st.integers(-5, 10**7))
def test_generate_size_answers_or_explains(ratio, area):
    try:
        rows, columns = generate_size(ratio, area)
    except Emu3Error:
        return
    assert rows > 0 and columns > 0


@pytest.mark.parametrize(
    "ratio", ["", "1", "16x9", "16:", ":9", "0:1", "1:0", "-1:1", "1.5:1", "1:1:1", "a:b", "1:1\n"]
)
def test_malformed_ratio(ratio):
    with pytest.raises(Emu3Error, match="is not width:height in whole numbers: give for example"):
        generate_size(ratio, 518400)


@pytest.mark.parametrize("ratio", ["51:10", "1:6", "99999:1"])
def test_elongated_ratio(ratio):
    with pytest.raises(Emu3Error, match=f"ratio {ratio} is too elongated"):
        generate_size(ratio, 518400)


@pytest.mark.parametrize("area", [0, -1, 2**31, 10**400, 0.5, "518400", None])
def test_bad_area(area):
    with pytest.raises(Emu3Error, match="it must be a whole number of pixels"):
        generate_size("1:1", area)


@pytest.mark.parametrize(
    "ratio, factor, least",
    [("1:1", 8, 144), ("1:1", 2, 9), ("5:1", 8, 720), ("1:5", 16, 2880), ("7:5", 8, 202), ("16:9", 8, 256)],
)
def test_the_least_area(ratio, factor, least):
    width, height = map(int, ratio.split(":"))
    assert least_area(factor, width, height) == least
    assert min(generate_size(ratio, least, factor)) == 2
    for area in (1, least - 1):
        message = f"samples.area is {area}: at ratio {ratio} it must be at least {least} pixels, .* {factor}x{factor} "
        with pytest.raises(Emu3Error, match=message):
            generate_size(ratio, area, factor, name="samples.area")


@given(ratio=st.sampled_from(["1:1", "5:4", "16:9", "1:3", "5:1"]), area=st.integers(1, 10_000))
def test_a_picture_has_about_the_area_that_was_asked_for(ratio, area):
    try:
        rows, columns = generate_size(ratio, area)
    except Emu3Error:
        return
    assert min(rows, columns) >= 2 and 0.64 <= rows * columns * 64 / area <= 1.78


# ------------------------------------------------------------------------------------------------ Emu3.5


@pytest.mark.parametrize("area, height, width, expected", golden_json("emu35/smart_resize.json"))
def test_area_resize_equals_the_reference_of_emu35(area, height, width, expected):
    if expected == "error":
        with pytest.raises(Emu3Error, match="has no code at an area"):
            area_resize(height, width, 16, area)
    else:
        assert list(area_resize(height, width, 16, area)) == expected


@given(height=st.integers(8, 20_000), elongation=st.floats(0.05, 20), factor=st.sampled_from([2, 8, 16]))
def test_area_resize_reaches_the_area_and_keeps_the_shape(height, elongation, factor):
    width = max(1, round(height * elongation))
    rows, columns = (side / factor for side in area_resize(height, width, factor, 720 * 720))
    assert rows == int(rows) and columns == int(columns)
    exact = ((720 * 720 * height / width) ** 0.5 / factor, (720 * 720 * width / height) ** 0.5 / factor)
    slack = 1 + max(1, elongation) / factor  # rounding down cuts less than a pixel from the height
    assert abs(rows - exact[0]) < 1 and abs(columns - exact[1]) < slack


@pytest.mark.parametrize("height, width, area", [(0, 5, 1024), (5, 0, 1024), (1, 100_000, 1024), (100_000, 1, 1024)])
def test_pictures_without_a_code(height, width, area):
    with pytest.raises(Emu3Error, match=f"a picture of {width}x{height} pixels has no code at an area of {area}"):
        area_resize(height, width, 16, area)
