"""The comparison of optimizers, on a toy training: what runs, what its controls change, what is reported."""

from __future__ import annotations

import json
import math
import queue
import threading
from itertools import pairwise
from statistics import mean, stdev

import matplotlib.image
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from benchmarks.comparison import compare_optimizers, regimes, response, runs
from benchmarks.comparison.candidates import make_optimizer
from benchmarks.comparison.compare_optimizers import CANDIDATES, next_runs, standing
from benchmarks.comparison.outcomes import NAME, Outcome, Run, load
from benchmarks.comparison.regime import Regime, Training, rate_factor
from benchmarks.comparison.regimes import REGIMES

STEPS = 6
CPU = torch.device("cpu")
KINDS = {"first": "0.*", "last": "4.*"}


def toy(seed: int) -> Training:
    """Return a regression of three matrices, whose batches depend on seed and step alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1000 * seed + step)) * torch.logspace(0, -1, 6)
        return x, x[:, :4].sin()

    return Training(model, batch, lambda model, data: mse_loss(model(data[0]), data[1]), (batch(-1), batch(-2)))


@pytest.fixture
def regime(monkeypatch):
    made = Regime(toy, STEPS, 0.1, (1e-3, 2e-3), (4e-3, 8e-3), KINDS, interval=2, evaluations=3)
    monkeypatch.setitem(REGIMES, "toy", made)
    return made


class Threads:
    """Workers in this process, which see the toy; those of another process are in a test of their own."""

    Queue = queue.Queue
    Process = threading.Thread


@pytest.fixture
def trained(regime, monkeypatch):
    """Return the list of runs that are trained, by threads."""
    made: list[Run] = []
    own = Regime.train
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda method: Threads)
    monkeypatch.setattr(Regime, "train", lambda self, run, device: made.append(run) or own(self, run, device))
    return made


# A run


@pytest.mark.parametrize("candidate", [*(each for each in CANDIDATES.values() if "@" not in each), "p=-4@last=2"])
def test_every_candidate_trains_and_a_run_repeats(candidate, regime):
    outcome, again = (regime.train(Run("toy", candidate, 4e-3, 1), CPU) for _ in range(2))
    data = toy(1)
    with torch.no_grad():
        before = mean(data.loss(data.model, batch).item() for batch in data.validation)
    assert outcome.loss < before
    assert (outcome.loss, outcome.training_loss) == (again.loss, again.training_loss)
    assert list(outcome.exponents) == (["2", "4", "6"] if "adaptive" in candidate else [])
    for exponents in outcome.exponents.values():
        assert list(exponents) == ["0.weight", "2.weight", "4.weight"]
        assert all(-0.25 <= s <= 1 for s in exponents.values())


def test_a_run_is_a_plain_loop(regime):
    data = toy(3)
    model = data.model
    matrices, vectors = ([W for W in model.parameters() if (W.ndim == 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 8e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS)),  # a tenth of six steps is no warm-up
    )
    for step in range(STEPS):
        data.loss(model, data.batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    expected = mean(data.loss(model, batch).item() for batch in data.validation)
    assert regime.train(Run("toy", "adamw", 8e-3, 3), CPU).loss == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_rate_warms_up_for_a_tenth_and_falls_as_a_cosine():
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1, rel=1e-6, abs=0)
    assert factors.index(max(factors)) == 9
    assert all(a > b for a, b in pairwise(factors[9:]))
    assert factors[50] == pytest.approx(0.5, rel=1e-6, abs=0)
    assert factors[99] < 1e-3


def test_a_run_that_diverges_has_an_infinite_loss(regime):
    outcome = regime.train(Run("toy", "adamw", 1e30, 0), CPU)
    assert outcome.loss == math.inf
    assert Outcome(**json.loads(json.dumps(vars(outcome)))) == outcome


def test_an_outcome_has_its_curve_its_time_and_the_size_of_the_state(regime):
    outcome = regime.train(Run("toy", "adamw", 8e-3, 3), CPU)
    assert [step for step, _, _ in outcome.curve] == [2, 4, 6]
    assert outcome.curve[-1][2] == outcome.loss
    assert 0 < outcome.curve[0][1] < outcome.curve[-1][1] <= outcome.seconds + 1e-3
    parameters = list(toy(3).model.parameters())
    assert outcome.state == sum(8 * W.numel() + 4 for W in parameters)  # two moments and a step
    muon = regime.train(Run("toy", "muon", 8e-3, 3), CPU)
    assert muon.state == outcome.state - sum(4 * W.numel() + 4 for W in parameters[::2])  # of matrices, one momentum
    assert muon.machine
    assert muon.memory == 0


def test_the_images_are_digits_and_batches_repeat():
    images, labels = regimes._digits()
    assert images.shape == (5000, 1, 28, 28)
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.bincount().tolist() == [500] * 10
    batch, validation = regimes._images(0, 8)
    assert torch.equal(batch(3)[0], batch(3)[0])
    assert not torch.equal(batch(3)[0], regimes._images(1, 8)[0](3)[0])
    assert sum(len(of_labels) for _, of_labels in validation) == 1000


# Candidates


def p_of(optimizer) -> dict[str, float]:
    optimizer.create_state()
    return optimizer.learned_p()


def exponents_of(optimizer) -> torch.Tensor:
    return torch.tensor([1 / p for p in p_of(optimizer).values()])


def history(candidate, regime, seed):
    """Return 1/p of every matrix after each step, (steps, matrices), with weights that stay as they are."""
    data = regime.make(0)
    optimizer = make_optimizer(candidate, regime, data.model, 0.0, seed)
    found = []
    for step in range(STEPS):
        data.loss(data.model, data.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(exponents_of(optimizer))
    return torch.stack(found)


def test_the_shuffled_control_permutes_what_is_estimated(regime):
    own = history(CANDIDATES["adaptive"], regime, 0)
    assert own[-1].unique().numel() == 3
    permutations = set()
    for seed in range(4):
        shuffled = history(CANDIDATES["adaptive, shuffled"], regime, seed)
        order = [(own[-1] == s).nonzero().item() for s in shuffled[-1]]
        torch.testing.assert_close(shuffled, own[:, order], atol=0, rtol=0)  # one permutation for all steps
        permutations.add(tuple(order))
    assert len(permutations) > 1


def test_random_p_are_in_range_and_of_the_seed(regime):
    first, again, other = (
        exponents_of(make_optimizer("random", regime, regime.make(0).model, 1e-3, seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    many = torch.cat(
        [exponents_of(make_optimizer("random", regime, regime.make(0).model, 1e-3, seed)) for seed in range(30)]
    )
    assert ((many >= -0.25) & (many <= 0.2)).all()
    assert many.min() < -0.2
    assert many.max() > 0.15


def test_a_kind_of_layer_has_a_p_of_its_own(regime):
    optimizer = make_optimizer("p=-4@last=2@first=inf", regime, regime.make(0).model, 1e-3, 0)
    assert p_of(optimizer) == {"0.weight": math.inf, "2.weight": -4.0, "4.weight": 2.0}


def test_heads_are_not_routed_and_a_schedule_ends_with_the_run(regime):
    headed = Regime(**vars(regime) | {"heads": ("4.weight",)})
    optimizer = make_optimizer("p=schedule,p_schedule=4:-5", headed, regime.make(0).model, 1e-3, 0)
    assert list(p_of(optimizer)) == ["0.weight", "2.weight"]
    found = history("p=schedule,p_schedule=4:-5", regime, 0)[:, 0]
    torch.testing.assert_close(found[-1], torch.tensor(-0.2), atol=1e-6, rtol=0)
    assert (found.diff() < 0).all()


@pytest.mark.parametrize("name", ["text", "lora", "vit", "convolutions"])
def test_every_kind_of_a_regime_is_some_of_its_matrices(name, monkeypatch):
    monkeypatch.setattr(regimes, "_text", lambda *arguments: (None, ()))
    monkeypatch.setattr(regimes, "_images", lambda *arguments: (None, ()))
    monkeypatch.setattr(regimes, "_pretrained", lambda: regimes._gpt2(regimes._LENGTH, layers=1, width=32))
    real = REGIMES[name]
    for kind in real.kinds:
        optimizer = make_optimizer(f"p=-4@{kind}=3", real, real.make(0).model, 1e-3, 0)
        assert set(p_of(optimizer).values()) == {-4.0, 3.0}


# Sweeps


def sweep(loss_of, candidate="p=inf", seeds=3):
    """Run what is next until nothing is, with losses of a function of rate and seed; return all outcomes in order."""
    outcomes: list[Outcome] = []
    while following := next_runs("toy", candidate, outcomes, seeds):
        outcomes += [
            Outcome("toy", candidate, run.rate, run.seed, loss_of(run.rate, run.seed), 0.0, 0.0) for run in following
        ]
    return outcomes


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (1.4e-3, [1e-3, 2e-3, 5e-4]),  # nearer to the smaller
        (8e-3, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
        (2.5e-4, [1e-3, 2e-3, 5e-4, 2.5e-4, 1.25e-4]),
        (1e3, [1e-3 * 2**i for i in range(7)]),  # and no further
    ],
)
@pytest.mark.usefixtures("regime")
def test_a_sweep_goes_on_while_its_best_rate_is_at_an_end(best, rates):
    outcomes = sweep(lambda rate, seed: abs(math.log(rate / best)))
    assert [each.rate for each in outcomes if each.seed == 0] == pytest.approx(rates, rel=1e-9, abs=0)
    found = min(rates, key=lambda rate: abs(math.log(rate / best)))
    others = [(each.rate, each.seed) for each in outcomes if each.seed]
    assert others == [(pytest.approx(found, rel=1e-9, abs=0), seed) for seed in (1, 2)]


@pytest.mark.usefixtures("regime")
def test_a_sweep_begins_with_the_candidates_own_rates_and_passes_over_divergence():
    assert [run.rate for run in next_runs("toy", "adamw", [], 3)] == [4e-3, 8e-3]
    outcomes = sweep(lambda rate, seed: math.inf if rate > 1.5e-3 else 1 + abs(math.log(rate / 5e-4)))
    assert [each.rate for each in outcomes if each.seed == 0] == [1e-3, 2e-3, 5e-4, 2.5e-4]
    assert {each.rate for each in outcomes if each.seed} == {5e-4}


@pytest.mark.usefixtures("regime")
def test_sweeps_come_before_further_seeds():
    done = sweep(lambda rate, seed: abs(math.log(rate / 1.4e-3)), seeds=1)
    seeds = [run.seed for run in compare_optimizers.wanted(["toy"], ["p=inf", "p=-4"], done, 3)]
    assert seeds == [0, 0, 1, 2]


# Whole runs


def cells_of(text: str) -> dict[str, list[str]]:
    """Return the cells of the rows of printed tables by their first one."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def number_and_error(cell: str) -> list[float]:
    return [float(part) for part in cell.split(" ± ")]


def test_interrupted_runs_go_on_and_the_report_is_of_what_has_run(trained, tmp_path, capsys):
    path = tmp_path / "out" / NAME
    chosen = [CANDIDATES["p = -4"], CANDIDATES["adaptive"]]
    begun = runs.run_all(path, lambda done: compare_optimizers.wanted(["toy"], chosen, done, 3), workers=2, device=CPU)
    first = [next(begun) for _ in range(3)]
    begun.close()
    assert load(path) == first
    before = len(trained)

    command = ["toy", "--only", "p = -4", "adaptive", "--seeds", "3", "--output", str(path.parent)]
    compare_optimizers.main([*command, "--deadline", "0"])
    assert len(trained) == before
    compare_optimizers.main(command)
    outcomes = load(path)
    assert outcomes[:3] == first
    keys = [(each.candidate, each.rate, each.seed) for each in outcomes]
    assert len(set(keys)) == len(keys)
    again = len(trained)
    compare_optimizers.main(command)  # nothing is missing
    assert len(trained) == again

    capsys.readouterr()
    compare_optimizers.main(["toy", "--report", "--output", str(path.parent)])
    rows = cells_of(capsys.readouterr().out)
    assert {name for name in rows if name.strip("-") not in ("", "optimizer")} == {"p = -4", "adaptive"}
    losses = {}
    for name in ("p = -4", "adaptive"):
        own = [each for each in outcomes if each.candidate == CANDIDATES[name]]
        best = min((each for each in own if each.seed == 0), key=lambda each: each.loss).rate
        losses[name] = [next(e.loss for e in own if (e.rate, e.seed) == (best, seed)) for seed in range(3)]
        assert rows[name][:2] == [f"{best:g}", "3"]
        expected = [mean(losses[name]), stdev(losses[name]) / 3**0.5]
        assert number_and_error(rows[name][2]) == pytest.approx(expected, rel=0, abs=6e-5)
    differences = [a - b for a, b in zip(losses["adaptive"], losses["p = -4"], strict=True)]
    expected = [mean(differences), stdev(differences) / 3**0.5]
    assert number_and_error(rows["adaptive"][3]) == pytest.approx(expected, rel=0, abs=6e-5)
    assert rows["p = -4"][3] == ""


def test_no_run_begins_that_would_outlast_the_deadline(trained, tmp_path):
    path, long = tmp_path / NAME, Outcome("toy", "p=2", 1e-3, 0, 1.0, 1.0, seconds=1000.0)
    path.write_text(long.line())
    following = Run("toy", "p=2", 2e-3, 0)
    for deadline, expected in ((900.0, []), (1e6, [following])):
        wanted = lambda done: [run for run in [following] if len(done) == 1]  # noqa: E731
        list(runs.run_all(path, wanted, workers=1, device=CPU, deadline=deadline))
        assert trained == expected


def test_responses_are_paired_with_the_base_at_its_best_rate(trained, tmp_path, capsys):
    command = ["toy", "--seeds", "2", "--output", str(tmp_path)]
    response.main(command)
    assert not trained  # without a best rate of p = -4, there is nothing to vary
    compare_optimizers.main([*command, "--only", "p = -4", "adaptive"])
    capsys.readouterr()
    response.main(command)
    outcomes = load(tmp_path / NAME)
    base = standing("toy", "p = -4", outcomes)
    varied = [each for each in outcomes if "@" in each.candidate]
    assert {each.rate for each in varied} == {base.rate}
    assert len(varied) == 2 * len(KINDS) * len(response.VALUES)
    shown = cells_of(capsys.readouterr().out)
    response.main([*command, "--report"])
    assert cells_of(capsys.readouterr().out) == shown
    for kind in KINDS:
        for p, cell in zip(response.VALUES, shown[kind], strict=True):
            differences = [
                each.loss - base.losses[each.seed] for each in varied if each.candidate == f"p=-4@{kind}={p}"
            ]
            expected = [mean(differences), stdev(differences) / 2**0.5]
            assert number_and_error(cell) == pytest.approx(expected, rel=0, abs=6e-5)
    assert len({cell for kind in KINDS for cell in shown[kind]}) > 1
    height, width, _ = matplotlib.image.imread(tmp_path / "response.png").shape
    assert width > 2 * height * 0.9  # two panels, side by side

    adaptive = standing("toy", "adaptive", outcomes)
    last = [each.exponents[str(STEPS)]["0.weight"] for each in adaptive.best.values()]
    assert len(last) == 2
    assert response.chosen_exponents("toy", "first", outcomes) == pytest.approx(last, rel=1e-12, abs=0)


@pytest.mark.slow  # another process imports everything again
def test_a_worker_of_another_process_tells_what_failed(tmp_path):
    impossible = Run("poetry", "p=-4", 1e-3, 0)
    runs_of = runs.run_all(tmp_path / NAME, lambda done: [impossible], workers=1, device=CPU)
    with pytest.raises(RuntimeError, match=r"Run\(regime='poetry', .*\) failed: .*'poetry' is not a regime"):
        next(runs_of)


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (compare_optimizers.main, ["poetry"]),
        (compare_optimizers.main, ["text", "--only", "SGD"]),
        (compare_optimizers.main, ["text", "--seeds", "0"]),
        (response.main, ["text", "--workers", "0"]),
        (response.main, ["poetry"]),
    ],
)
def test_malformed_arguments(main, arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[-1] in capsys.readouterr().err
