"""Both scripts by one interface, and an oracle: TeaCache written a second time, around the stock forward."""

import itertools

import numpy as np
import torch

DAMPING, CURVATURE, IDENTITY = 0.25, 60.0, [1.0, 0.0]


class Machine:
    """One script and its model. A job is what one generation is asked for."""

    def apply(self, model, steps=8, coefficients=IDENTITY, **settings):
        return self.script.apply_teacache(model, steps, coefficients=coefficients, **settings)

    def stock(self, model):
        """The model's stock forward, whatever has been done to the model or its class."""
        return lambda *args, **kwargs: self.models.STOCK_FORWARD(model, *args, **kwargs)

    def oracle(self, model, job, steps=8, num_steps=None, run=None, **settings):
        """Outputs, latents and schedule that TeaCache should give in a fresh process; run: arguments of `denoise`."""
        oracle = Oracle(self, model, num_steps or steps, **settings)
        return *self.denoise(oracle, job, steps, **{"before": oracle.at, **(run or {})}), oracle.schedule

    def path(self, model, job):
        """The sum of all changes of an uncached generation: thresholds below it skip some steps."""
        oracle = Oracle(self, model, 8, rel_l1_thresh=1e-9)
        self.denoise(oracle, job, before=oracle.at)
        return sum(oracle.changes)

    def block_calls(self, model):
        """A list that grows by one at each call of the block."""
        calls = []
        self.block(model).register_forward_pre_hook(lambda *_: calls.append(1))
        return calls


class Lumina2(Machine):
    name, passes = "lumina2", 2  # passes: calls of one guided step

    def __init__(self):
        import lumina_models

        from TeaCache4LuminaT2X import teacache_lumina2

        self.models, self.script = lumina_models, teacache_lumina2
        self.cls = lumina_models.Lumina2Transformer2DModel

    def model(self, seed=0):
        return self.models.tiny_model(seed, num_layers=1)

    def block(self, model):
        return model.layers[0]

    def last(self, model):
        return model.norm_out

    def job(self, seed=0, noise=0, guided=True, size=(4, 4), dtype=torch.float32, length=7):
        negative = self.models.conditioning([3], 100 + seed, dtype) if guided else None
        return {
            "cond": self.models.conditioning([length], seed, dtype),
            "uncond": negative,
            "seed": noise,
            "size": size,
        }

    def tensors(self, job):
        return [t for pair in (job["cond"], job["uncond"]) if pair for t in pair]

    def denoise(self, model, job, steps=8, start=1.0, **kwargs):
        return self.models.denoise(model, **job, steps=steps, start=start, **kwargs)

    def call(self, model, job, time, value=None):
        """One call of the model at this time, 0 to 1."""
        latents = torch.randn(1, 4, *job["size"], generator=torch.Generator().manual_seed(job["seed"]))
        latents = latents if value is None else torch.full_like(latents, value)
        return model(latents, torch.tensor([time]), *job["cond"])[0]

    def watch(self, model, seen):
        """Hooks that put the signal and the input of the blocks into `seen`."""
        norm = model.layers[0].norm1
        yield norm.register_forward_hook(lambda module, inputs, output: seen.update(signal=output[0]))
        yield model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.update(before=inputs[0]))

    def time(self, args, kwargs):
        return kwargs["timestep"][0].item()


class Memo(Machine):
    name, passes = "memo", 1

    def __init__(self):
        import memo_models

        from TeaCache4Memo import teacache_memo

        self.models, self.script = memo_models, teacache_memo
        self.cls = memo_models.memo.UNet3DConditionModel

    def model(self, seed=0):
        blocks = {"down_block_types": ("CrossAttnDownBlock3D",), "up_block_types": ("CrossAttnUpBlock3D",)}
        return self.models.tiny_unet(seed, block_out_channels=(32,), **blocks)

    def block(self, model):
        return model.mid_block

    def last(self, model):
        return model.conv_norm_out

    def job(self, seed=0, noise=0, guided=True, size=(4, 4), dtype=torch.float32, length=2):
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        reference = self.models.tiny_reference(block_out_channels=(32,), **blocks)
        clip = self.models.Clip(seed, guided, frames=length, size=size, dtype=dtype, reference=reference)
        generator = torch.Generator().manual_seed(noise)
        clip.noise = torch.randn(clip.noise.shape, generator=generator).to(dtype)
        return clip

    def tensors(self, job):
        from conftest import tensors_in

        return tensors_in(job.inputs)

    def denoise(self, model, job, steps=8, start=1.0, before=None, cast=False, timesteps=None, **kwargs):
        kwargs |= {"cast": bool(cast), "timesteps": timesteps or (lambda i, t: t * start)}
        kwargs["before_step"] = (lambda i: before(i, "both", i)) if before else None
        return self.models.denoise(model, job, steps, **kwargs)

    def call(self, model, job, time, value=None):
        sample = torch.cat([job.noise] * (1 + job.guided))
        sample = sample if value is None else torch.full_like(sample, value)
        return model(sample, timestep=torch.tensor(1000.0 * (1 - time)), return_dict=False, **job.inputs)[0]

    def watch(self, model, seen):

        def look(module, args, kwargs):
            seen.update(dict.fromkeys(("signal", "before"), kwargs["hidden_states"]))

        yield model.down_blocks[0].register_forward_pre_hook(look, with_kwargs=True)

    def time(self, args, kwargs):
        timestep = kwargs["timestep"]
        times = [float(t) for t in (timestep if isinstance(timestep, list) else [timestep])]
        return 1 - sum(times) / len(times) / 1000


def expected_times(times, num_steps):
    """Of all steps, where only those so far are known. The odds of sigma are the shift times those of the steps left."""
    start, odds = (1 - times[0]) or 1.0, lambda x: x / (1 - x)
    sigma, step = (1 - times[-1]) / start, len(times) - 1
    shift = odds(sigma) / odds(1 - step / num_steps) if 0 < sigma < 1 else 1.0
    later = [shift * odds(1 - i / num_steps) for i in range(step + 1, num_steps)]
    return [*times, *(1 - start * x / (1 + x) for x in later)]


def choose_steps(times, last, count):
    """The choice of steps for a budget, written a second time: all are tried. Of equal ones, the earliest at the end."""
    steps = len(times)
    way = [0.75 * steps * (t - times[0]) / ((1 - times[0]) or 1.0) + 0.25 * i for i, t in enumerate(times)] + [steps]

    def error(j, k):
        return round(100 * sum((way[m + 1] - way[m]) * (way[m] - way[j]) ** 2 for m in range(j + 1, k)))

    choices = itertools.combinations(range(last + 1, steps - 1), min(count, steps - 1 - last) - 1) if count else ()
    sums = {chosen: sum(map(error, (last, *chosen), (*chosen, steps - 1))) for chosen in choices}
    best = min(sums, key=lambda chosen: (sums[chosen], chosen[::-1]), default=None)
    return [] if best is None else [*best, steps - 1]


def rescale(poly, change):
    """The polynomial; without end where the change lies beyond the first place at which it sinks below zero."""
    places = [r.real for r in poly.r if not r.imag and r.real > 0 and poly(0.999 * r.real) > 0 > poly(1.001 * r.real)]
    return np.inf if places and change > min(places) else poly(change)


class Oracle:
    """Runs the stock forward at every call, and puts what a skipped one would give in place of its output.

    It is told the step and the branch (`where`) instead of finding them out.
    """

    def __init__(
        self, machine, model, num_steps, rel_l1_thresh=None, coefficients=IDENTITY, computed_steps=None, tolerance=None
    ):
        self.machine, self.model, self.num_steps, self.budget = machine, model, num_steps, computed_steps
        self.thresh, self.poly = rel_l1_thresh, np.poly1d(coefficients)
        self.tolerance, self.errors = tolerance, {}  # step: the largest error of its forecasts
        self.schedule, self.times, self.changes, self.branches, self.accumulated = [], [], [], {}, 0.0
        self.last, self.where, self.chosen = (None, None), None, None

    def at(self, step, branch, count):
        self.where = step, branch

    def __call__(self, *args, **kwargs):
        (step, branch), seen, time = self.where, {}, self.machine.time(args, kwargs)
        memory = self.branches.setdefault(branch, {})
        if memory.get("step") not in (step, step - 1):
            memory.clear()
        memory["step"] = step
        needed = "made" not in memory or kwargs.get("update_past_memory", False)

        def last_module(module, inputs):
            if len(self.schedule) == step:
                self.times.append(time)
                self.schedule.append(bool(self.decide(step, branch, needed, seen["signal"])))
            seen["skip"] = not self.schedule[step] and not needed
            if seen["skip"] and self.thresh is not None:
                return seen["before"] + memory["made"], *inputs[1:]
            seen["residual"] = inputs[0] - seen["before"]

        hooks = [*self.machine.watch(self.model, seen)]
        hooks.append(self.machine.last(self.model).register_forward_pre_hook(last_module))
        try:
            output = self.machine.stock(self.model)(*args, **kwargs)[0]
        finally:
            for hook in hooks:
                hook.remove()
        if self.thresh is not None:
            memory["made"] = memory["made"] if seen["skip"] else seen["residual"]
        elif seen["skip"]:
            output = self.forecast(memory, time)
        else:
            earlier = [(t, x) for t, x in memory.get("made", []) if t != time]
            if len(earlier) == 2:
                error = (self.forecast(memory, time) - output).abs().mean() / output.abs().mean()
                self.errors[step] = max(self.errors.get(step, 0.0), error.item())
            memory["made"] = [*earlier[-1:], (time, output.clone())]
        return (output,)

    def forecast(self, memory, time):
        (t1, output), *earlier = memory["made"][::-1]
        if not earlier:
            return output
        t0, before = earlier[0]
        g = (time - t1) / (t1 - t0)
        return output + (output - before) * (g / (1 + DAMPING * g))

    def is_due(self, step):
        """Whether a budget has this step: chosen once, and again if another one had to be computed."""
        done = [i for i, computed in enumerate(self.schedule) if computed]
        if self.chosen is None or self.chosen[: len(done)] != done:
            times = expected_times(self.times, self.num_steps)
            self.chosen = done + choose_steps(times, done[-1], self.budget - len(done))
        return step in self.chosen

    def is_wrong(self, step):
        """Whether the errors that are expected since the last computed step add up to the tolerance."""
        at = [i for i, computed in enumerate(self.schedule) if computed]
        if len(at) < 2 or self.times[step] - self.times[at[-1]] > 0.2:
            return True
        curvature = CURVATURE
        for i, j in zip(at, at[1:]):
            if j in self.errors:
                curvature = max(self.errors[j] / (self.times[j] - self.times[i]) ** 2, 0.8 * curvature)
        total = 0.0
        for i in range(at[-1] + 1, step + 1):
            total += (self.times[i] - self.times[i - 1]) * curvature * (self.times[i] - self.times[at[-1]]) ** 2
        return not total < self.tolerance

    def decide(self, step, branch, needed, signal):
        (decider, old), self.last = self.last, (branch, signal)
        compute = step == 0 or step >= self.num_steps - 1 or needed or self.thresh == 0
        if not compute and self.budget is not None:
            compute = self.is_due(step)
        elif not compute and self.tolerance is not None:
            compute = self.is_wrong(step)
        elif not compute:
            change = np.nan
            if decider == branch:
                change = ((signal - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)).item()
            self.changes.append(change)
            self.accumulated += rescale(self.poly, change)
            compute = not self.accumulated < self.thresh
        self.accumulated = 0.0 if compute else self.accumulated
        return compute
