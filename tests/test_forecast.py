"""`predict="forecast"` for Lumina2: the output of a skipped step continues the last two computed ones."""

import pytest
from conftest import equal, tensors_in
from lumina_models import Interrupted, Oracle, conditioning, denoise, tiny_model

from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache

STEPS, IDENTITY = 8, [1.0, 0.0]
PROMPT, NEGATIVE = conditioning([5], seed=1), conditioning([3], seed=2)


@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["unguided", "guided"])
@pytest.mark.parametrize("thresh", [0.0, 0.05, 0.1, 0.2, 9.0])
def test_outputs_and_schedule(thresh, negative):
    model = tiny_model()
    oracle = Oracle(model, thresh, IDENTITY, STEPS)
    expected = denoise(oracle, PROMPT, negative, before_call=oracle.at, steps=STEPS)
    apply_teacache(model, STEPS, thresh, IDENTITY, predict="forecast")
    assert equal(denoise(model, PROMPT, negative, steps=STEPS), expected)
    assert model.teacache.schedule == oracle.schedule
    assert tensors_in(model.teacache) == []


def test_thresholds_above_skip_some_and_compute_some():
    counts = []
    for thresh in (0.0, 0.05, 0.1, 0.2, 9.0):
        model = tiny_model()
        apply_teacache(model, STEPS, thresh, IDENTITY, predict="forecast")
        denoise(model, PROMPT, NEGATIVE, steps=STEPS)
        counts.append(sum(model.teacache.schedule))
    assert counts[0] == STEPS and counts[-1] == 2 and any(2 < n < STEPS for n in counts)


def test_forecast_and_hold_differ_only_in_skipped_steps():
    """The same first gap: with one computed output there is no line yet, and both reuse what they have."""
    found = {}
    for predict in ("hold", "forecast"):
        model = tiny_model()
        apply_teacache(model, STEPS, 9.0, IDENTITY, predict=predict)
        found[predict] = denoise(model, PROMPT, steps=STEPS)[0]
    assert equal(found["hold"][0], found["forecast"][0]) and not equal(found["hold"][1], found["forecast"][1])
    assert all(equal(output, found["forecast"][0]) for output in found["forecast"][:-1]), "the last output again"


def test_a_skipped_step_runs_no_block_and_no_output_projection():
    model, calls = tiny_model(), []
    for name in ("layers", "norm_out"):
        module = getattr(model, name)
        (module[0] if name == "layers" else module).register_forward_hook(lambda *_, name=name: calls.append(name))
    apply_teacache(model, STEPS, 9.0, predict="forecast", coefficients=IDENTITY)
    denoise(model, PROMPT, steps=STEPS)
    assert calls == ["layers", "norm_out"] * 2


def test_at_most_two_outputs_are_held():
    model, held = tiny_model(), []
    apply_teacache(model, STEPS, 1e-6, IDENTITY, predict="forecast")

    def look(step, name, count):
        state = vars(model).get("teacache")
        held.append(max((len(b.computed) for b in state.branches), default=0) if state else 0)

    denoise(model, PROMPT, NEGATIVE, before_call=look, steps=STEPS)
    assert max(held) == 2 and sum(model.teacache.schedule) == STEPS


@pytest.mark.parametrize("wrong", ["guess", None, 2])
def test_other_words_are_refused(wrong):
    with pytest.raises(ValueError, match="hold or forecast"):
        apply_teacache(tiny_model(), predict=wrong)


def test_the_caller_may_write_into_the_output():
    """What is remembered is not what was returned."""
    found = []
    for spoil in (False, True):
        model = tiny_model()
        forward = apply_teacache(model, STEPS, 9.0, IDENTITY, predict="forecast").forward
        outputs = []

        def call(*args, forward=forward, outputs=outputs, spoil=spoil, **kwargs):
            output = forward(*args, **kwargs)[0]
            outputs.append(output.clone())
            return (output.mul_(0) + outputs[-1] if spoil else output,)

        denoise(call, PROMPT, steps=STEPS)
        found.append(outputs)
    assert equal(*found)


def test_changed_in_the_middle():
    """Residuals and outputs are never taken for each other: the generation begins anew."""
    model = tiny_model()
    apply_teacache(model, STEPS, 9.0, IDENTITY)

    def switch(step, name, count):
        model.predict = "forecast" if step >= 3 else "hold"

    outputs, _ = denoise(model, PROMPT, NEGATIVE, before_call=switch, steps=STEPS)
    assert model.teacache.schedule == [True] + [False] * 4 and all(o.shape == outputs[0].shape for o in outputs)


@pytest.mark.parametrize("at", range(2 * STEPS))
def test_after_an_interruption_as_fresh(at):
    """Before each call of the pipeline; the next picture may begin at the timestep at which the last one stopped."""
    model = tiny_model()
    apply_teacache(model, STEPS, 0.1, IDENTITY, predict="forecast")
    expected = denoise(model, PROMPT, NEGATIVE, steps=STEPS)

    def stop(step, name, count):
        if count == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        denoise(model, PROMPT, NEGATIVE, before_call=stop, steps=STEPS)
    assert equal(denoise(model, PROMPT, NEGATIVE, steps=STEPS), expected)
