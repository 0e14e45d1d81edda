"""A fake network whose outputs tell which computed calls they are made of, and random loops that check it."""

import copy
import itertools

import torch
from machines import forecast, is_euler, kept, set_timesteps

PLACES = {"whole": [(0, 8)], "tiles": [(0, 4), (4, 8)], "tiles in another order": [(4, 8), (0, 4)]}
PLACES |= {"overlapping": [(0, 6), (2, 8)], "moved": [(2, 8), (0, 6)]}
PLACES |= {"of two sizes": [(0, 4), (2, 8)], "of two sizes, in another order": [(2, 8), (0, 4)]}


class Failed(Exception):
    pass


class Stub(torch.nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.weight = run, torch.nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


class Traced:
    """The n-th computed call adds a mark: in the second half of each sample a number at place n, in the first half a
    slope over sigma, which nearly all calls share, so that outputs are extrapolated. The rest of the network is stubs.
    """

    HEIGHT, MARK = 32, 0.3

    def __init__(self, machine):
        self.machine, self.calls, self.fails, self.factor = machine, [], False, 1.0
        self.generator = torch.Generator().manual_seed(0)
        self.network = getattr(self, machine.name)(machine.model())
        setattr(self, machine.script.NETWORK, self.network)

    def lumina2(self, network):
        network.register_to_config(hidden_size=16)  # what a patch has

        def patches(x):
            return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

        def embed(x):
            self.look_for_failure()
            self.embedded, self.latents = patches(x), x
            return self.embedded

        block = Stub(lambda hidden, *_: hidden + patches(self.mark(self.latents)))
        block.norm1 = Stub(lambda hidden, temb: (self.factor * hidden,))
        nothing = torch.nn.ModuleList()
        network.context_refiner, network.noise_refiner, network.layers = nothing, nothing, torch.nn.ModuleList([block])
        network.time_caption_embed = Stub(lambda x, time, embeds: (None, embeds))
        network.rope_embedder = Stub(lambda x, mask: (x, *[None] * 3, [0] * len(x), [x[0, 0].numel() // 4] * len(x)))
        network.x_embedder, network.norm_out = Stub(embed), Stub(lambda hidden, temb: hidden - self.embedded)
        network.peft_config, network.lora = {}, Stub(None)
        vars(network.lora).update(lora_A={}, disable_adapters=False, active_adapters=["style"], scaling={})
        return network

    def memo(self, network):
        def keep(x):
            self.look_for_failure()
            self.embedded = self.factor * x
            return self.embedded

        network.down_blocks = network.up_blocks = torch.nn.ModuleList()
        network.num_upsamplers, network.time_proj, network.time_embedding = 0, Stub(torch.zeros_like), Stub(lambda x: x)
        network.mid_block = Stub(lambda x, audio_embedding, **_: (x + self.mark(x), audio_embedding))
        network.conv_in, network.conv_norm_out = Stub(keep), Stub(lambda x: x - self.embedded)
        network.conv_act = network.conv_out = Stub(lambda x: x)
        return network

    def look_for_failure(self):
        fails, self.fails = self.fails, False
        if fails:
            raise Failed

    def noise(self, samples):
        frames = [2] * (self.machine.name == "memo")
        return torch.randn(samples, 4, *frames, self.HEIGHT, 8, generator=self.generator)

    def mark(self, latents):
        mark = torch.zeros_like(latents).flatten(1)
        half = mark.shape[1] // 2
        mark[:, :half] = 0.5 * (1 + self.sigma + 0.05 * torch.rand(len(mark), 1, generator=self.generator))
        mark[:, half + len(self.calls)] = self.MARK
        self.calls.append((self.sigma, self.step, self.meaning, mark))
        return mark.view_as(latents)

    def conditioning(self, prompts):
        """Of prompts by number."""
        embeds = torch.stack([torch.full((3, 16), float(prompt)) for prompt in prompts])
        if self.machine.name == "lumina2":
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": torch.ones(len(embeds), 3)}
        features = {"down": [], "mid": [[[torch.zeros(1)]]], "up": []}
        return {"ref_features": features, "encoder_hidden_states": embeds}

    def call(self, latents, t, conditioning, step, meaning, scale=1.0):
        """A call of the network; meaning: for each sample, what must agree. Returns the output, and if it is computed."""
        self.sigma, self.step, self.meaning, before = t.item() / 1000, step, meaning, len(self.calls)
        if self.machine.name == "lumina2":
            time, self.network.lora.scaling["style"] = (1 - t / 1000).expand(len(latents)), scale
            output = self.network(latents, time, **conditioning, return_dict=False)[0]
        else:
            more = {"audio_emotion": torch.tensor([scale])}
            output = self.network(latents, timestep=t, **conditioning, **more, return_dict=False)[0]
        is_computed = len(self.calls) > before
        for b, (flat, means) in enumerate(zip(output.flatten(1), meaning)):
            if is_computed:
                assert torch.allclose(flat, self.calls[-1][-1][b], atol=1e-4)
            else:
                self.check(flat, b, means)
        return output, is_computed

    def found(self, flat):
        """{computed call: its share} of what an output, or a movement of latents, is made of."""
        shares = flat[len(flat) // 2 :] / self.MARK
        return {n: shares[n].item() for n in (shares.abs() > 1e-3).nonzero().flatten().tolist()}

    def check(self, flat, b, means):
        """An output is held or extrapolated: of calls of the same image, prompt, scale and tile, at the steps before."""
        made_of = self.found(flat)
        assert made_of and all(n < len(self.calls) for n in made_of)
        for n in made_of:
            _, step, meaning, mark = self.calls[n]
            assert meaning[b] == means and step < self.step, (n, meaning[b], step, "in", means, self.step)
        last = max(made_of, key=made_of.get)
        if len(made_of) == 1:
            assert torch.allclose(flat, self.calls[last][-1][b], atol=1e-4)
            return
        (before,) = made_of.keys() - {last}
        first = [n for n in range(before) if self.calls[n][2][b] == means]
        ways = [[(self.calls[n][0], self.calls[n][-1][b : b + 1]) for n in (n, before, last)] for n in first]
        assert any(torch.allclose(forecast(way, self.sigma)[0], flat, atol=1e-4) for way in ways)


class Image:
    def __init__(self, latents, lineages):
        self.latents, self.lineages = latents, lineages
        self.index = self.next = 0  # of the step that is to come, and of the one that would
        self.moved, self.is_replaced = torch.zeros(()), False


class RandomLoop:
    """A loop of somebody's own, in which strange things happen before some steps.

    Each sample of an image has a lineage: where something is put in its place, where the index jumps or where another
    scheduler steps, it is another one. Outputs and corrections are of one lineage, and the printed schedule is true.
    """

    def __init__(self, machine, scheduler, way, samples=1):
        self.traced, self.scheduler, self.samples = Traced(machine), scheduler, samples
        self.lineages, self.number, self.conditionings = itertools.count(), itertools.count(), {}
        self.places, self.prompts, self.scale = "whole", [tuple(range(samples))], 1.0
        self.ran = []  # of each step: whether a call was computed
        self.writes = self.looks_ahead = False  # into what the network returned; with one more step of the scheduler
        self.is_euler = is_euler(scheduler)
        # such a scheduler may move latents to others that it has kept
        self.is_careful = any(name in type(scheduler).__name__ for name in ("Heun", "UniPC", "DPM"))
        machine.script.apply_teacache(self.traced.network, scheduler=scheduler, **way)
        self.begin("set")

    @property
    def schedule(self):
        return self.traced.network.teacache.schedule

    # ---- what may happen before a step ----

    def happen(self, event, *args):
        getattr(self, event)(*args)

    def begin(self, how):
        """Another image; one that is not set goes in turns with those before."""
        if how == "set" or self.driver is not self.scheduler or self.is_careful:
            set_timesteps(self.scheduler, 6)
            self.images = []
        elif how == "begin index":
            self.scheduler._step_index = None
            self.scheduler.set_begin_index(0)
        self.driver, self.is_plain, self.first = self.scheduler, True, len(self.ran)
        self.image = Image(self.traced.noise(self.samples), self.new_lineages())
        self.images.append(self.image)

    def turn(self):
        if self.is_careful:
            return
        self.image, self.is_plain = self.images[(self.images.index(self.image) + 1) % len(self.images)], False

    def new_lineages(self):
        return [next(self.lineages) for _ in range(self.samples)]

    def replace(self, how, in_place=False):
        """By a callback, once a step: mirrored twice, latents are themselves."""
        image = self.image
        if image.is_replaced or (self.is_careful and how != "blend"):
            return
        image.is_replaced = True
        rand, noise = torch.rand(image.latents.shape, generator=self.traced.generator), self.traced.noise(self.samples)
        put = {"roll": image.latents.roll(3, -1), "mirror": image.latents.flip(-1), "noise": noise}
        put["crop"] = image.latents[..., : self.traced.HEIGHT // 2, :]
        put["blend"] = image.latents + 0.5 * rand * image.moved  # as inpainting does
        image.lineages = image.lineages if how == "blend" else self.new_lineages()
        if in_place:
            image.latents.copy_(put[how])
        else:
            image.latents = put[how]

    def jump(self, by):
        if self.driver is self.scheduler:
            self.image.index = min(max(self.image.index + by, 0), len(self.scheduler.timesteps) - 1)

    def reorder(self, latents):
        """The prompts of a batch, with or without their latents."""
        if latents:
            self.image.latents, self.image.lineages = self.image.latents.flip(0), self.image.lineages[::-1]
        self.prompts = [prompts[::-1] for prompts in self.prompts]

    def prompt(self, first):
        self.prompts[0] = tuple(first + b for b in range(self.samples))

    def guide(self):
        self.prompts = self.prompts[:1] if len(self.prompts) > 1 else [*self.prompts, (9,) * self.samples]

    def set(self, name, value):
        setattr(self, name, value)

    def other(self, index=None):
        """A copy of the scheduler goes on, whose first step is that of the other; or begins an image at an index."""
        if index is not None:
            self.image = Image(self.traced.noise(self.samples), self.new_lineages())
            self.image.index = self.image.next = index
        if self.image.index == self.image.next:
            self.driver, self.is_plain = copy.deepcopy(self.scheduler), False

    def stop_inside(self, how):
        """After the calls of a step, before its end."""
        self.calls(self.scheduler.timesteps[self.image.index], None, 1)
        self.begin(how)

    def fail(self, call=0):
        self.is_plain &= self.places == "whole"  # tiles have one prompt, so that it might be any
        self.run(fails=call)

    def again(self):
        self.run(times=2)

    # ---- a step ----

    def run(self, fails=None, times=1):
        image, index, timesteps = self.image, self.image.index, self.scheduler.timesteps
        if index >= len(timesteps):
            return self.begin("set")
        if index != image.next:
            image.lineages, self.is_plain = self.new_lineages(), False
        if (self.driver.step_index or 0) != index or (self.driver.step_index is None and index):
            self.driver._step_index = index
        velocity, meanings, is_computed = self.calls(timesteps[index], fails, times)
        self.ran.append(is_computed)
        if self.driver is self.scheduler:
            assert self.schedule == self.ran[-len(self.schedule) :]
        assert not self.is_plain or len(self.schedule) == len(self.ran) - self.first, "one entry a step"
        after = self.driver.step(velocity, timesteps[index], image.latents, return_dict=False)[0]
        if self.is_euler and self.places == "whole":
            sigma, next_sigma = self.driver.sigmas[index : index + 2]
            correction = after - (image.latents + (next_sigma - sigma) * velocity)
            for b, flat in enumerate(correction.flatten(1)):
                made_of = {self.traced.calls[n][2][b] for n in self.traced.found(flat)}
                assert made_of <= {meaning[b] for meaning in meanings}
        if self.looks_ahead and index + 1 < len(timesteps):
            self.driver.step(velocity, timesteps[index + 1], after)
            self.driver._step_index -= 1
        image.moved, image.latents = after - image.latents, after
        image.index = image.next = index + 1
        image.is_replaced = False
        if self.driver is not self.scheduler:
            image.lineages = self.new_lineages()
        elif image.index == len(timesteps):
            assert kept(self.traced.network) == []

    def calls(self, t, fails, times):
        """Velocity, meanings, and whether a call was computed."""
        image, meanings, is_computed, step = self.image, [], False, next(self.number)
        velocity = torch.zeros_like(image.latents)
        for prompts in self.prompts:
            conditioning = self.conditionings.setdefault(prompts, self.traced.conditioning(prompts))
            for a, b in PLACES[self.places]:
                meaning = [(image.lineages[i], prompts[i], self.scale, (a, b)) for i in range(self.samples)]
                args = image.latents[..., a:b], t, conditioning, step, meaning, self.scale
                self.traced.fails = fails == len(meanings)
                for _ in range(times):
                    try:
                        output, computed = self.traced.call(*args)
                    except Failed:
                        output, computed = self.traced.call(*args)
                    is_computed |= computed
                velocity[..., a:b] += output
                if self.writes:
                    output.zero_()
                meanings.append(meaning)
        self.traced.fails = False
        return velocity, meanings, is_computed
