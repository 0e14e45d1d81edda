"""Other people's rules for skipping steps of a diffusion transformer, each from its published formula.

A rule that looks at the latents is an object for one image: `skip(i, t, x)` returns the output to use in step i, or None
to compute it, and `see(i, t, x, output)` is told what was computed. t is the time: 0 is noise, 1 the image. An output is
(2, channels, height, width): with the prompt, and without. A rule that does not look at the latents is a schedule, a list
of bools, by which `Blocks` skips the layers.
"""

import torch


class EasyCache:
    """EasyCache, arXiv 2507.02860: adds what the network added to its input at the last computed step.

    The change of the output is estimated from that of the input, with their ratio k at the last computed steps, and added
    up. As in the authors' code for Wan (H-EmbodVis/EasyCache), the first fifth of the steps and the last one are always
    computed, the branch with the prompt decides, and the velocity points from image to noise (Lumina2's is its negative).
    """

    def __init__(self, steps, threshold):
        self.steps, self.threshold = steps, threshold
        self.k = self.last_x = self.computed_x = self.output = None
        self.error = 0.0

    def skip(self, i, t, x):
        if i >= self.steps // 5 and i < self.steps - 1 and self.k is not None:
            self.error += self.k * mean_of(x - self.last_x) / mean_of(self.output[0])
            if self.error < self.threshold:
                self.last_x = x
                return self.output + self.computed_x - x
        self.error, self.last_x = 0.0, x
        return None

    def see(self, i, t, x, output):
        if self.output is not None:
            self.k = mean_of(output[0] - self.output[0]) / mean_of(x - self.computed_x)
        self.computed_x, self.output = x, output


class PrediT:
    """PrediT, arXiv 2602.18093: an Adams-Bashforth forecast whose horizon follows the change of the output.

    Forecast: the derivative of the output is taken from its last two differences, weighted as in Adams-Bashforth 2 with
    unequal steps. Horizon: threshold / (relative change per step) ** (1/3), at most 8 steps. Corrector: where the change
    per step exceeds `high`, the step is evaluated (the paper weighs it as Adams-Moulton does; here it is used as it is).
    """

    def __init__(self, steps, threshold, high=0.1):
        self.steps, self.threshold, self.high, self.points, self.horizon = steps, threshold, high, [], 0

    def skip(self, i, t, x):
        if i == self.steps - 1 or len(self.points) < 3 or i - self.points[-1][0] > self.horizon:
            return None
        (_, ta, a), (_, tb, b), (_, tc, c) = self.points
        before, last = (b - a) / (tb - ta), (c - b) / (tc - tb)
        ratio = (t - tc) / (tc - tb)
        return c + (t - tc) * (last + (last - before) * ratio / 2)

    def see(self, i, t, x, output):
        if self.points:
            j, _, last = self.points[-1]
            change = mean_of(output - last) / mean_of(last) / (i - j)
            self.horizon = 0 if change > self.high else min(8, int(self.threshold / (change + 1e-8) ** (1 / 3)))
        self.points = [*self.points[-2:], (i, t, output)]


class FoCa:
    """FoCa, arXiv 2508.16211, at the steps of a schedule: forecast with BDF2, then calibrate with Heun's rule.

    The paper's equations were not found: this is what the comments of cache-dit's FoCaCalibrator say, in unequal steps.
    BDF2, with the slope of the last two values (computed or forecast), goes on along that slope. Heun's rule then starts
    from the last computed value, with the mean of this slope and that of the last two computed values.
    """

    def __init__(self, steps, schedule):
        self.schedule, self.computed, self.values = schedule, [], []

    def skip(self, i, t, x):
        if self.schedule[i]:
            return None
        last_t, last = self.computed[-1]
        if len(self.computed) == 1:
            return last
        output = last + (t - last_t) / 2 * (slope(self.computed) + slope(self.values))
        self.values = [*self.values[-1:], (t, output)]
        return output

    def see(self, i, t, x, output):
        self.computed = [*self.computed[-1:], (t, output)]
        self.values = [*self.values[-1:], (t, output)]


def slope(points):
    (t0, v0), (t1, v1) = points
    return (v1 - v0) / (t1 - t0)


class L2P:
    """L2P, arXiv 2604.26365, at the steps of a schedule: a step's own weights for the outputs computed before it.

    The paper's equations and code were not found: this is what its abstract says. weights: see `fit`.
    """

    def __init__(self, steps, schedule, weights):
        self.schedule, self.weights, self.computed = schedule, weights, []

    def skip(self, i, t, x):
        if self.schedule[i]:
            return None
        history = self.computed[-len(self.weights[i]) :]
        return sum(weight * output for weight, output in zip(self.weights[i], history))

    def see(self, i, t, x, output):
        self.computed.append(output)

    @staticmethod
    def fit(trajectory, schedule, longest=4):
        """{step: weights} of at most `longest` computed outputs, by least squares. trajectory: the outputs of all steps."""
        weights, computed = {}, []
        for i, is_computed in enumerate(schedule):
            if is_computed:
                computed.append(i)
            else:
                history = torch.stack([trajectory[j].flatten() for j in computed[-longest:]], 1).double()
                target = trajectory[i].flatten().double()
                weights[i] = torch.linalg.lstsq(history, target[:, None]).solution[:, 0].tolist()
        return weights


class Blocks(torch.nn.Module):
    """In the place of the layers of the transformer: skips them by a schedule, and adds their last residual.

    calls_per_step: 2 with guidance. `ratios`: of the norms of the residuals of successive computed steps, by token.
    """

    def __init__(self, layers, schedule, calls_per_step=2):
        super().__init__()
        self.layers, self.schedule, self.calls, self.ratios = layers, schedule, 0, []
        self.residuals = [None] * calls_per_step

    def forward(self, hidden_states, *args):
        step, branch = divmod(self.calls, len(self.residuals))
        self.calls += 1
        if not self.schedule[step]:
            return hidden_states + self.residuals[branch]
        output = hidden_states
        for layer in self.layers:
            output = layer(output, *args)
        last, self.residuals[branch] = self.residuals[branch], output - hidden_states
        if branch == 0 and last is not None:
            self.ratios.append((self.residuals[branch].norm(dim=-1) / last.norm(dim=-1)).mean().item())
        return output


# Of ComfyUI-TeaCache for Lumina2, highest power first
COMFYUI_COEFFICIENTS = -8.74643948e02, 4.66059906e02, -7.51559762e01, 5.32836175e00, -3.27258296e-02


def comfyui_schedule(embeddings, threshold, start=0.2):
    """welltop-cn/ComfyUI-TeaCache, its rule for Lumina2: the relative change of the bare timestep embedding, rescaled.

    embeddings: of each step. The first fifth of the steps is always computed, and the change is added up there too.
    """
    schedule, total = [True], 0.0
    for i, (last, new) in enumerate(zip(embeddings, embeddings[1:]), 1):
        change, rescaled = mean_of(new - last) / mean_of(last), 0.0
        for coefficient in COMFYUI_COEFFICIENTS:
            rescaled = rescaled * change + coefficient
        total += rescaled
        reached = not total < threshold
        total = 0.0 if reached else total
        schedule.append(reached or i / len(embeddings) < start)
    return schedule


def magcache_schedule(ratios, threshold, longest=5, retention=0.1):
    """MagCache, arXiv 2506.09045, with the settings of its code for FLUX (Zehong-Ma/MagCache).

    ratios: of each step, the norm of the residual over that of the step before, measured on a few prompts; 1 for the first.
    """
    schedule, product, error, skipped = [], 1.0, 0.0, 0
    for i, ratio in enumerate(ratios):
        if i >= int(retention * len(ratios) + 0.5):
            product *= ratio
            skipped += 1
            error += abs(1 - product)
        skip = 0 < skipped <= longest and error <= threshold
        if not skip:
            product, error, skipped = 1.0, 0.0, 0
        schedule.append(not skip)
    return schedule


def mean_of(x):
    return x.abs().mean(dtype=torch.float32).item()
