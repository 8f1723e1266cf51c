"""Numbers and tables as text."""

from evaluation.tables import number, with_interval


def test_numbers_as_text():
    assert [number(v) for v in (0.12345, 12345.6, -3.0, 0.0, None)] == [
        "0.1235",
        "1.235e+04",
        "-3.000",
        "0.000",
        "–",
    ]
    assert with_interval(1.0, [0.5, 1.25], signed=True) == "+1.000 [+0.5000, +1.250]"
    assert with_interval(1.0, None) == "1.000"
