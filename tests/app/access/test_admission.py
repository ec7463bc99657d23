"""How many requests may be in flight, counted by themselves."""

import pytest
from prometheus_client import CollectorRegistry, Gauge

from app.access.admission import Admission
from app.errors import TooManyRequests


@pytest.fixture
def gauge() -> Gauge:
    return Gauge("in_flight", "", registry=CollectorRegistry())


def test_places_are_counted_and_given_back(gauge: Gauge) -> None:
    admission = Admission(2, gauge)
    with admission.place():
        with admission.place():
            assert (admission.in_flight, gauge._value.get()) == (2, 2)
            with pytest.raises(TooManyRequests, match="2 "), admission.place():
                pass
            assert admission.in_flight == 2, "a rejected request holds nothing"
        with admission.place():
            assert admission.in_flight == 2
    assert (admission.in_flight, gauge._value.get()) == (0, 0)


def test_a_request_that_fails_gives_its_place_back(gauge: Gauge) -> None:
    admission = Admission(1, gauge)
    for _ in range(3):
        with pytest.raises(RuntimeError), admission.place():
            raise RuntimeError
    assert admission.in_flight == 0


def test_no_places_at_all(gauge: Gauge) -> None:
    with pytest.raises(TooManyRequests), Admission(0, gauge).place():
        pass
