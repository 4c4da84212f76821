"""Every bad archive of the corpus is answered with the right reason at the right place."""

import time
from pathlib import Path

import pytest

from tests.bad_archives import Case, all_cases
from tests.preprocess_import import forget_peak_memory, import_archive, peak_memory_bytes

CASES = all_cases()


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_archives_are_answered_with_reason_and_place(case: Case, tmp_path: Path) -> None:
    began = time.perf_counter()
    imported = import_archive(case.data, tmp_path)
    seconds = time.perf_counter() - began
    assert [(p.where, p.reason.value) for p in imported.problems] == case.problems
    assert all(p.description for p in imported.problems)
    assert seconds < 2


def test_a_png_whose_chunk_claims_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "image .png: chunk of 2147483647 bytes")
    before = forget_peak_memory()
    import_archive(case.data, tmp_path)
    assert peak_memory_bytes() - before < 200 << 20
