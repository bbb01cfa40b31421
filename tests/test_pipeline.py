"""Where scoring runs. What the stages compute: test_rounds."""

import pytest

from tokenclean_ray.config import Score
from tokenclean_ray.pipeline import is_little_work

MB = 1 << 20


@pytest.mark.parametrize(
    ("score", "sizes", "tokens", "little"),
    [
        ({}, [1 * MB, 1 * MB], 100_000, True),
        ({}, [1 * MB, 1 * MB], 1_000_000, False),
        ({}, [0.01 * MB], 1_000_000, True),
        ({}, [0.01 * MB], 10_000_000, False),  # tokens cost something by themselves
        ({}, [100 * MB], 1000, True),
        ({}, [200 * MB, 100 * MB], 1, False),  # the driver's memory
        ({}, [1 * MB, 0], 1000, False),  # a model of the hub, of any size
        ({"num_actors": 1}, [1 * MB], 1000, False),
        ({"num_actors": (1, 2)}, [1 * MB], 1000, False),
        ({"backend": "vllm"}, [1 * MB], 1000, False),
    ],
)
def test_seconds_of_work_are_for_the_driver_unless_actors_are_asked_for(score, sizes, tokens, little):
    assert is_little_work(Score(**score), sizes, tokens) is little
