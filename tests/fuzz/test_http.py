"""schemathesis on the OpenAPI document: no 5xx, answers as documented, nothing accepted that is not, no leak."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.fuzz.world import world
from tests.router import fake_tokens

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(3600)]
EXCLUDED = "positive_data_acceptance"
"""A sound body may still be refused: no schema says that a text is too long for a model, or a grammar ambiguous."""


async def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> str:
    """What schemathesis says, whose checks have all passed."""
    async with world(lambda size: monkeypatch.setattr(fake_tokens, "VOCAB_SIZE", size)) as the_world:
        url = f"http://{the_world.app.http_address}/openapi.json"
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", url]
        fixed = ("--exclude-checks", EXCLUDED, "--continue-on-failure", "--no-color", "--request-timeout", "60")
        process = await asyncio.create_subprocess_exec(
            *command, *fixed, *options, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            told = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
        await the_world.until_nothing_is_left()
    assert process.returncode == 0, told
    return told


def num_cases(told: str) -> int:
    match = re.search(r"(\d+) generated", told)
    assert match, told
    return int(match[1])


async def test_a_few_seeded_requests_keep_to_the_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = await run(monkeypatch, tmp_path, "--phases", "fuzzing", "--max-examples", "10", "--seed", "1")
    assert num_cases(told) > 40


@pytest.mark.fuzz
async def test_many_seeded_requests_keep_to_the_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seed, examples = os.environ.get("PENSTOCK_FUZZ_SEED", "1"), os.environ.get("PENSTOCK_FUZZ_EXAMPLES", "1400")
    told = await run(
        monkeypatch,
        tmp_path,
        "--phases",
        "coverage,fuzzing",
        "--workers",
        "4",
        "--max-examples",
        examples,
        "--seed",
        seed,
    )
    print(told)
    assert num_cases(told) >= int(os.environ.get("PENSTOCK_FUZZ_CASES", "10000"))
