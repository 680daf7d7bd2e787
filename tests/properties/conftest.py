"""Fixtures of the property tests: backends and numbers of examples."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dpo_kernels import use_backend

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "properties.json"
ENGINES = ("eager", "cpu", "triton", "cuda")
#: Number of examples for all properties together. Triton's interpreter takes twenty times as long per example as C++.
EXAMPLES = {"always": {"eager": 1000, "cpu": 1000, "triton": 200, "cuda": 400}, "slow": dict.fromkeys(ENGINES, 5000)}
COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
PROFILES = {
    "always": settings(derandomize=True, **COMMON),
    "slow": settings(derandomize=False, **COMMON),
}
seen: dict[str, Counter[str]] = {name: Counter() for name in ENGINES}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend. The CUDA sources run on the emulator (tests/cuda_emulator)."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name == "cuda":
            from cuda_emulator import serve_backend

            serve_backend(patch)
        with use_backend(name):
            yield name


@pytest.fixture(params=["always", pytest.param("slow", marks=pytest.mark.slow)])
def effort(request: pytest.FixtureRequest) -> str:
    """Whether to test few examples that are always the same, or many random ones."""
    return request.param


def examples(
    engine: str, effort: str, share: float, drawn: st.SearchStrategy[Any], property_of: Callable[[Any], None]
) -> None:
    """Check a property on its share of the number of examples."""
    count = max(1, round(share * EXAMPLES[effort][engine]))

    def check(value: Any) -> None:
        seen[engine]["examples"] += 1
        property_of(value)

    run = settings(PROFILES[effort], max_examples=count, phases=[Phase.generate, Phase.shrink])(given(drawn)(check))
    try:
        run()
    except BaseException:
        seen[engine]["violations"] += 1
        raise


@pytest.fixture(autouse=True)
def results() -> Iterator[None]:
    """If DPO_WRITE_RESULTS is 1, write the counts so far to benchmarks/results, because a long run may be ended early."""
    yield
    if os.environ.get("DPO_WRITE_RESULTS") == "1":
        found = {name: {"examples": n["examples"], "violations": n["violations"]} for name, n in seen.items() if n}
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**before, **found}, indent=1) + "\n")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence warnings of numpy, which Triton's interpreter uses, about intended NaN and infinities."""
    import numpy

    with numpy.errstate(all="ignore"):
        yield
