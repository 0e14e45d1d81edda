"""Both scripts by one interface, and an oracle: TeaCache written a second time, around the stock forward."""

import copy
import functools
import itertools

import conftest
import diffusers
import numpy as np
import pytest
import torch
from conftest import on_device, tensors_in
from diffusers import FlowMatchEulerDiscreteScheduler

IDENTITY = [1.0, 0.0]


def randn(shape, seed):
    return on_device(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


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
        return model.layers[0].attn  # the block itself is called for its modulated input, too

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

    def watch(self, model, seen):
        """Hooks that put the signal and the input of the blocks into `seen`."""
        norm = model.layers[0].norm1
        yield norm.register_forward_hook(lambda module, inputs, output: seen.update(signal=output[0]))
        yield model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.update(before=inputs[0]))

    def sigma(self, args, kwargs):
        return (1 - kwargs["timestep"][0]).item()


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
        clip.noise = on_device(randn(clip.noise.shape, noise).to(dtype))
        return clip

    def tensors(self, job):
        return tensors_in(job.inputs)

    def denoise(self, model, job, steps=8, start=1.0, before=None, cast=False, timesteps=None, **kwargs):
        kwargs |= {"cast": bool(cast), "timesteps": timesteps or (lambda i, t: t * start)}
        kwargs["before_step"] = (lambda i: before(i, "both", i)) if before else None
        return self.models.denoise(model, job, steps, **kwargs)

    def watch(self, model, seen):

        def look(module, args, kwargs):
            seen.update(dict.fromkeys(("signal", "before"), kwargs["hidden_states"]))

        yield model.down_blocks[0].register_forward_pre_hook(look, with_kwargs=True)

    def sigma(self, args, kwargs):
        timestep = kwargs["timestep"]
        times = [torch.as_tensor(t).float().mean() for t in (timestep if isinstance(timestep, list) else [timestep])]
        return (torch.stack(times).mean() / 1000).item()


def twin(model):
    """A network of its own with the very weights of the other: bit for bit holds for the same tensors in memory."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def forecast(made, sigma):
    """Along the last change, as far as the change before has lasted: each sample by itself. made: (sigma, output)s."""
    sigmas, outputs = zip(*made)
    if len(made) < 3:
        return outputs[-1]
    changes = [(b - a).float() for a, b in zip(outputs, outputs[1:])]
    gaps = [b - a for a, b in zip(sigmas, sigmas[1:])]
    products = [(changes[0] * c).sum(tuple(range(1, c.ndim)), keepdim=True) for c in changes]
    lasted = (products[1] / products[0].clamp(min=1e-30) * (gaps[0] / gaps[1])).clamp(0, 1)
    return outputs[-1] + (lasted * min((sigma - sigmas[-1]) / gaps[1], 2.0) * changes[1]).to(outputs[-1].dtype)


def decided(outputs):
    """The excess over noise of the output of the call that has most, in the sample that has least."""
    return min(max(max(min(x.float().pow(2).mean().item() for x in output) for output in outputs) - 1, 0), 1)


@functools.cache
def chosen(sigmas, count, decided=1.0):
    """The steps to compute, by trying all: the length of each skipped step times the square of its distance from the
    last computed one, twice before the last step, which cannot make up for it; summed in hundredths between computed
    steps. Of equal sums, the one whose last steps are the earliest.
    """
    steps, end = len(sigmas), len(sigmas) - 1
    if end == 0:
        return (0,)
    shift = 3 ** min(max(2 - 5 * decided, 0), 1)
    left = [s / (sigmas[0] or 1) for s in sigmas]
    place = [steps * (1 - s / (s + shift - shift * s)) for s in left] + [steps]

    @functools.cache
    def error(a, b):  # of skipping what is between
        times = 2 if b == end else 1
        return round(100 * times * sum((place[m + 1] - place[m]) * (place[m] - place[a]) ** 2 for m in range(a + 1, b)))

    ways = ((0, *way, end) for way in itertools.combinations(range(1, end), min(count, steps) - 2))
    return min(ways, key=lambda way: (sum(map(error, way, way[1:])), way[::-1]))


class Oracle:
    """Runs the stock forward at every call, and puts what a skipped one would give in place of its output.

    It is told the step and the branch (`where`) instead of finding them out, and the steps that are chosen.
    """

    def __init__(
        self, machine, model, num_steps, rel_l1_thresh=None, coefficients=IDENTITY, computed_steps=None, sigmas=None
    ):
        self.machine, self.model, self.num_steps = machine, model, num_steps
        self.thresh, self.coefficients, self.plan, self.sigmas = rel_l1_thresh, coefficients, computed_steps, sigmas
        self.count = computed_steps if isinstance(computed_steps, int) else None
        self.plan = range(num_steps) if self.count else computed_steps
        self.schedule, self.changes, self.branches, self.accumulated = [], [], {}, 0.0
        self.last, self.where = (None, None), None

    def at(self, step, branch, count):
        self.where = step, branch

    def __call__(self, *args, **kwargs):
        (step, branch), seen = self.where, {}
        memory = self.branches.setdefault(branch, {})
        if memory.get("step") not in (step, step - 1) or kwargs.get("update_past_memory", False):
            memory.clear()
        memory["step"] = step
        needed = "made" not in memory

        def last_module(module, inputs):
            if len(self.schedule) == step:
                self.schedule.append(bool(self.decide(step, branch, needed, seen["signal"])))
            seen["skip"] = not self.schedule[step] and not needed
            if seen["skip"] and self.plan is None:
                return seen["before"] + memory["made"], *inputs[1:]
            seen["residual"] = inputs[0] - seen["before"]

        hooks = [*self.machine.watch(self.model, seen)]
        hooks.append(self.machine.last(self.model).register_forward_pre_hook(last_module))
        try:
            output = self.machine.stock(self.model)(*args, **kwargs)[0]
        finally:
            for hook in hooks:
                hook.remove()
        sigma = self.sigmas[step] if self.sigmas else self.machine.sigma(args, kwargs)
        if self.plan is None:
            memory["made"] = memory["made"] if seen["skip"] else seen["residual"]
        elif seen["skip"]:
            output = forecast(memory["made"], sigma)
        else:
            earlier = [(s, v) for s, v in memory.get("made", []) if s != sigma]
            memory["made"] = [*earlier[-2:], (sigma, output.clone())]
        return (output,)

    def decide(self, step, branch, needed, signal):
        (decider, old), self.last = self.last, (branch, signal)
        compute = step == 0 or step >= self.num_steps - 1 or needed or self.thresh == 0
        if step == 1 and self.count:
            sigmas = tuple(self.sigmas or [1 - step / self.num_steps for step in range(self.num_steps)])
            outputs = [memory["made"][-1][1] for memory in self.branches.values() if "made" in memory]
            self.plan = chosen(sigmas, self.count, decided(outputs))
        if not compute and self.plan is not None:
            compute = step in self.plan
        elif not compute:
            change = np.nan
            if decider == branch:
                change = ((signal - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)).item()
            self.changes.append(change)
            rescaled = np.polyval(self.coefficients, change)
            self.accumulated += np.inf if change >= 0.1 and rescaled < 0 else rescaled
            compute = not self.accumulated < self.thresh
        self.accumulated = 0.0 if compute else self.accumulated
        return compute


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}),
    "stochastic": ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0, "stochastic_sampling": True}),
    "LCM": ("FlowMatchLCMScheduler", {"shift": 2.0}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "UniPC": ("UniPCMultistepScheduler", FLOW),
    "UniPC, merged timesteps": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 20.0}),
    "DPM": ("DPMSolverMultistepScheduler", FLOW),
    "Euler, a large shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 100.0}),
}


def scheduler(name):
    """One of these, or the test is skipped."""
    cls, config = SCHEDULERS[name]
    try:
        found = getattr(diffusers, cls)(**config)
        found.set_timesteps(8)
        return found
    except (TypeError, ValueError, AttributeError):
        pytest.skip(f"not with diffusers {diffusers.__version__}")


class Stopped(Exception):
    pass


def set_timesteps(scheduler, steps):
    """As Lumina2Pipeline does, where the scheduler can."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=conftest.DEVICE)
    else:
        scheduler.set_timesteps(steps, device=conftest.DEVICE)


def sigmas_of(scheduler):
    return (scheduler.timesteps.double() / 1000).tolist()


def is_euler(scheduler):
    is_euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    return is_euler and not scheduler.config.get("stochastic_sampling", False)


class Loop:
    """A pipeline of a network and a scheduler: it draws without guidance, one or more latents at a time."""

    def __init__(self, machine, scheduler=None, model=None):
        self.machine, self.job = machine, machine.job(guided=False)
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=2.0)
        self.model = model or machine.model()
        setattr(self, machine.script.NETWORK, self.model)

    def latents(self, seed):
        shape = (1, 4, 4, 4) if self.machine.name == "lumina2" else self.job.shape
        return randn(shape, seed)

    def call(self, latents, t, job=None, model=None):
        job, model = job or self.job, model or self.model
        if self.machine.name == "lumina2":
            time, (embeds, mask) = (1 - t / 1000).expand(len(latents)), job["cond"]
            inputs = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
            return -model(hidden_states=latents, timestep=time, **inputs, return_dict=False)[0]
        return model(latents, timestep=t, return_dict=False, **job.inputs)[0]

    @torch.no_grad()
    def draw(self, steps=8, start=0, seeds=(0,), stop=None, job=None, euler=False, before=None, after=None, model=None):
        """The last latents. start: the first step; several seeds: that many calls of each step; stop: before this step.

        before(i) gives the conditioning of a step, or None; after(i, t, velocity, latents) is a callback.
        """
        torch.manual_seed(0)  # for schedulers that draw noise
        set_timesteps(self.scheduler, steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        latents = [self.latents(seed) for seed in seeds]
        sigmas = self.scheduler.sigmas
        for i, t in enumerate(self.scheduler.timesteps[start:], start):
            if i == stop:
                raise Stopped
            job = (before and before(i)) or job
            velocities = [self.call(x, t, job, model) for x in latents]
            if euler:  # without the scheduler
                latents = [x + (sigmas[i + 1] - sigmas[i]) * v for x, v in zip(latents, velocities)]
                continue
            velocity, joint = torch.cat(velocities), torch.cat(latents)
            joint = self.scheduler.step(velocity, t, joint, return_dict=False)[0]
            latents = list(joint.split(1)) if len(seeds) > 1 else [joint]
            if after:
                after(i, t, velocity, joint)
        return latents

    def stopped(self, at, **kwargs):
        """An image that is stopped before this step."""
        try:
            self.draw(stop=at, **kwargs)
        except Stopped:
            pass

    @property
    def schedule(self):
        return self.model.teacache.schedule

    def apply(self, **way):
        return self.machine.script.apply_teacache(self, **way)


def kept(model):
    """The tensors that TeaCache holds, but for the scheduler's own timesteps."""
    return [t for t in tensors_in(model.teacache) if t is not model.teacache.timesteps]


def fresh(loop, way, *args, **kwargs):
    """What a new network with these weights and a new scheduler give: the latents, and the schedule."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(loop.scheduler.config)
    other = Loop(loop.machine, scheduler, loop.machine.script.remove_teacache(twin(loop.model)))
    other.apply(**way)
    return other.draw(*args, **kwargs), other.schedule
