"""How near a sampler that Solve OLSS fitted comes to the many steps of its teacher, on seeds and prompts that it has not
seen, beside euler and dpmpp_2m with as many steps.

    python bootstrap/olss_score.py image|video [--steps 4,8,12] [--paths uniform,graph,auto] [--seeds 8] [--runs 8]
        [--trials 24] [--teacher 50]

The runs of one prompt are recorded. Judged are that prompt and others, of each as many seeds as --seeds says. An error is
the root mean square difference to the teacher's last latent, relative to it; the last two columns are the largest ratios of
one picture's error to that of euler's and dpmpp_2m's from the same noise."""

import argparse
import time

import torch
from digits_score import DEFAULT_CFG, FILES, LATENT, load_model
from pack import ROOT, load_pack, use_comfyui

LEARN, JUDGE = 100, 5000  # first seeds
BATCH = 8


class Noise:
    """NOISE as RandomNoise gives it, drawn for each picture from a seed of its own."""

    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, latent):
        shape = latent["samples"].shape
        return torch.stack(
            [torch.randn(shape[1:], generator=torch.Generator().manual_seed(self.seed + i)) for i in range(shape[0])]
        )


def texts(kind: str, other: bool, count: int) -> list[str]:
    """The recorded prompt, or others, as many."""
    digits = ("zero", "one", "two", "three", "four", "five", "six", "eight", "nine")
    ways = ("left", "right", "up", "down")
    if not other:
        return ["seven" + (" moving left" if kind == "video" else "")] * count
    return [digits[i % 9] + (f" moving {ways[i % 4]}" if kind == "video" else "") for i in range(count)]


def prompt(rows: list[str]) -> list:
    from tessera.methods.digits import words

    tokens, pooled = words.encode(torch.tensor([words.parse(row) for row in rows]))
    return [[tokens, {"pooled_output": pooled}]]


class Judge:
    """Errors of samplers on pictures whose teacher's latents are known."""

    def __init__(self, model, kind: str, teacher: torch.Tensor, seeds: int):
        self.model, self.kind = model, kind
        self.rows = [(text, JUDGE + 1000 * other + i) for other in (False, True)
                     for i, text in enumerate(texts(kind, other, seeds))]  # fmt: skip
        self.wanted = self.latents("euler", teacher)

    def latents(self, sampler, sigmas: torch.Tensor) -> torch.Tensor:
        """[rows, n]"""
        import comfy.sample
        import comfy.samplers

        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        made = []
        for start in range(0, len(self.rows), BATCH):
            part = self.rows[start : start + BATCH]
            empty = torch.zeros(len(part), *LATENT[self.kind])
            noise = torch.cat([Noise(seed).generate_noise({"samples": empty[:1]}) for _, seed in part])
            made.append(comfy.sample.sample_custom(
                self.model, noise, DEFAULT_CFG[self.kind], sampler, sigmas, prompt([t for t, _ in part]),
                prompt([""] * len(part)), empty, disable_pbar=True, seed=1,
            ).flatten(1))  # fmt: skip
        return torch.cat(made)

    def errors(self, sampler, sigmas: torch.Tensor) -> torch.Tensor:
        return (self.latents(sampler, sigmas) - self.wanted).norm(dim=1) / self.wanted.norm(dim=1)


def recorded(model, kind: str, teacher: torch.Tensor, runs: int):
    from tessera.patching.olss import record
    from tessera.patching.sampling import Job

    latent = {"samples": torch.zeros(1, *LATENT[kind])}
    job = Job(prompt(texts(kind, False, 1)), prompt([""]), latent, None, teacher, Noise(LEARN), DEFAULT_CFG[kind])
    return record(model, job, runs, "euler", 65536)


def row(name: str, errors: torch.Tensor, rivals: list[torch.Tensor]) -> str:
    half = len(errors) // 2
    parts = [f"{part.mean():.4f} ({part.max():.4f})" for part in (errors[:half], errors[half:])]
    ratios = [f"{float((errors / rival).max()):.2f}" for rival in rivals]
    return "| " + " | ".join([name, *parts, *ratios]) + " |"


@torch.inference_mode()  # as ComfyUI runs everything
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(FILES))
    parser.add_argument("--steps", type=lambda s: [int(x) for x in s.split(",")], default=[4, 8, 12])
    parser.add_argument("--paths", type=lambda s: s.split(","), default=["uniform", "graph", "auto"])
    parser.add_argument("--seeds", type=int, default=8, help="of the recorded prompt, and as many of others")
    parser.add_argument("--runs", type=int, default=8, help="recorded")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--teacher", type=int, default=50, help="steps")
    args = parser.parse_args()
    use_comfyui()
    load_pack()
    import comfy.samplers

    from tessera.methods.sampling.olss import uniform_path
    from tessera.patching.olss import sampler_of
    from tessera.patching.olss_solve import Asked, solve

    model = load_model(ROOT / "models" / FILES[args.kind])
    sampling = model.get_model_object("model_sampling")
    teacher = comfy.samplers.calculate_sigmas(sampling, "simple", args.teacher)
    trajectory = recorded(model, args.kind, teacher, args.runs)
    judge = Judge(model, args.kind, teacher, args.seeds)
    print(f"{args.kind}, {args.runs} runs of {args.teacher} steps; mean (worst) of {args.seeds} seeds each")
    print(
        "| steps, sampler | recorded prompt | other prompts | worst / euler | worst / dpmpp_2m |\n|---|---|---|---|---|"
    )
    for steps in args.steps:
        even = teacher[uniform_path(args.teacher, steps)]
        rivals = [judge.errors(name, even) for name in ("euler", "dpmpp_2m")]
        for name, errors in zip(("euler", "dpmpp_2m"), rivals, strict=True):
            print(row(f"{steps}, {name}", errors, rivals), flush=True)
        for path in args.paths:
            start = time.perf_counter()
            table, lines = solve(trajectory, Asked(steps, path, 1e-4, "euler", 0.0, False, args.trials))
            took = time.perf_counter() - start
            errors = judge.errors(sampler_of(table), table.sigmas.float())
            where = lines[0].rpartition(" path ")[2]
            print(row(f"{steps}, OLSS {path}: {where} ({took:.0f} s)", errors, rivals), flush=True)


if __name__ == "__main__":
    main()
