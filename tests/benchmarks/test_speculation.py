"""What the embedded model is asked to go on with."""

from benchmarks.speculation import MODULES, NUM_REPEATED, NUM_SOURCE, source_prompts


def test_each_prompt_is_the_source_of_another_module_and_its_beginning_again() -> None:
    prompts = source_prompts()
    assert len({tuple(prompt) for prompt in prompts}) == len(MODULES)
    for prompt in prompts:
        assert len(prompt) == NUM_SOURCE + NUM_REPEATED
        assert prompt[NUM_SOURCE:] == prompt[:NUM_REPEATED]
