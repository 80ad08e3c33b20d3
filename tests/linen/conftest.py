import pytest
from linen_helpers import make_x


@pytest.fixture
def x():
    return make_x()
