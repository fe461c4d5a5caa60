"""The sparse layer against one that goes from token to token, in values and in derivatives of every order and way."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from dmoe.models.sparse import CosineRouter, Experts, LinearRouter, Routing, SparseFFN, balance_loss, balance_of, capacity, routings
from dmoe.models.sparse.routing import Weighting

T, D, H, E = 23, 6, 5, 4


def layer(
    *,
    top_k: int = 1,
    router: str = "cosine",
    weighting: Weighting = "probability",
    capacity_factor: float | None = None,
    noise: float = 0.0,
    shared_bias: bool = False,
    dropout: float = 0.0,
) -> SparseFFN:
    torch.manual_seed(0)
    b2 = torch.randn(D) if shared_bias else torch.randn(E, D)
    routers = {"cosine": CosineRouter(width=D, experts=E, projected=3), "linear": LinearRouter(width=D, experts=E), "average": None}
    made = SparseFFN(
        Experts(torch.randn(E, D, H), torch.randn(E, H), torch.randn(E, H, D), b2),
        act=nn.GELU(),
        router=routers[router],
        top_k=top_k,
        weighting=weighting,
        capacity_factor=capacity_factor,
        gate_noise=noise,
        balance_weight=0.3 if noise else 0.0,
        dropout=dropout,
    )
    return made.double().train(bool(noise or dropout))


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits_of(made: SparseFFN, x: Tensor) -> Tensor:
    if made.router is None:
        return torch.stack([x @ made.w1[e].mean(dim=1).detach() for e in range(E)], dim=1)
    if isinstance(made.router, LinearRouter):
        return x @ made.router.weight.T
    assert isinstance(made.router, CosineRouter)
    projected = x @ made.router.projection.weight.T + made.router.projection.bias
    cosines = [F.cosine_similarity(projected, made.router.codes[:, e][None], dim=1) for e in range(E)]
    return torch.stack(cosines, dim=1) * made.router.log_scale.exp()


def token_by_token(made: SparseFFN, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The layer's output, and its balance loss where there is noise."""
    clean = logits_of(made, x)
    noisy = clean if noise is None else clean + noise * made.gate_noise / E
    p, k = noisy.softmax(dim=1), made.top_k
    choices = [sorted(range(E), key=lambda e, t=t: -noisy[t, e].item())[:k] for t in range(T)]
    room = {e: math.inf if made.capacity_factor is None else k * int(made.capacity_factor * -(-T // E)) for e in range(E)}
    turned_away = set()
    by_priority = sorted(range(T), key=lambda t: -p[t].max().item())
    for place, t in product(range(k), by_priority):
        expert = choices[t][place]
        room[expert] -= 1
        if room[expert] < 0:
            turned_away.add((t, expert))
    rows = []
    for t, chosen in enumerate(choices):
        y = 0 * x[t]
        total = sum(p[t, e] for e in chosen) if k > 1 else 1.0
        for e in chosen:
            gate = {"one": 1.0, "probability": p[t, e] / total, "mean_one": k * p[t, e] / total}[made.weighting]
            b2 = made.b2 / k if made.b2.ndim == 1 else made.b2[e]
            if (t, e) not in turned_away:
                y = y + gate * (F.gelu(x[t] @ made.w1[e] + made.b1[e]) @ made.w2[e] + b2)
        rows.append(y)
    balance = torch.zeros((), dtype=x.dtype)
    if noise is not None:
        q = clean.softmax(dim=1)
        thresholds = torch.stack([noisy[t, choices[t][-1]] for t in range(T)])
        spread = made.gate_noise / E
        load = 0.5 * (1 + torch.erf((q - thresholds[:, None]) / (spread * math.sqrt(2))))
        for each in (q.sum(dim=0), load.sum(dim=0)):
            balance = balance + made.balance_weight * each.var(correction=1) / each.mean() ** 2 / 2
    return torch.stack(rows), balance


CASES = [
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": E},
    {"top_k": 1, "router": "linear", "capacity_factor": 1.0},
    {"top_k": 2, "capacity_factor": 0.6},
    {"top_k": 2, "capacity_factor": 0.1},
    {"top_k": 2, "noise": 1.0},
    {"top_k": 1, "noise": 2.0, "router": "linear"},
    {"top_k": 2, "noise": 1.0, "capacity_factor": 0.7},
    {"top_k": 2, "router": "average", "weighting": "one", "shared_bias": True},
    {"top_k": 2, "router": "average", "weighting": "one", "shared_bias": True, "capacity_factor": 0.7},
    {"top_k": 3, "weighting": "mean_one", "shared_bias": True},
]
NAMES = ["-".join(f"{key}_{value}" for key, value in case.items()) for case in CASES]


def said_and_balance(made: SparseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    with routings(made) as found:
        said = made(x)
    return said, balance_of(made, found) if made.gate_noise else x.new_zeros(())


def noise_of(made: SparseFFN) -> Tensor | None:
    torch.manual_seed(5)
    return torch.randn(T, E, dtype=torch.float64) if made.gate_noise else None


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_values_and_gradients_are_those_of_going_from_token_to_token(case: dict) -> None:
    made, x = layer(**case), inputs().requires_grad_()
    said, expected = said_and_balance(made, x), token_by_token(made, x, noise_of(made))
    wanted, direction = [x, *made.parameters()], inputs(2)
    for ours, theirs in zip(said, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad((y * direction).sum() + balance, wanted, materialize_grads=True) for y, balance in (said, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", CASES[:5] + CASES[9:], ids=NAMES[:5] + NAMES[9:])
def test_every_way_to_second_derivatives_agrees(case: dict) -> None:
    made, x, t = layer(**case), inputs(), inputs(3)
    theta = {name: p.detach() for name, p in made.named_parameters()}
    torch.manual_seed(4)
    v = {name: torch.randn_like(p) for name, p in theta.items()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return (functional_call(made, p, (x,)) - t).square().mean()

    forward_over_reverse = jvp(grad(loss), (theta,), (v,))[1]
    reverse_over_reverse = vjp(grad(loss), theta)[1](v)[0]
    near = {sign: grad(loss)({n: p + sign * 1e-6 * v[n] for n, p in theta.items()}) for sign in (-1, 1)}
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
    along = sum((g * v[name]).sum() for name, g in zip(leaves, first, strict=True))
    by_autograd = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
    slow = torch.autograd.grad((token_by_token_call(made, leaves, x) - t).square().mean(), list(leaves.values()), allow_unused=True)
    for number, name in enumerate(theta):
        torch.testing.assert_close(forward_over_reverse[name], reverse_over_reverse[name], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(forward_over_reverse[name], by_autograd[number], rtol=1e-11, atol=1e-13)
        differences = (near[1][name] - near[-1][name]) / 2e-6
        torch.testing.assert_close(forward_over_reverse[name], differences, rtol=1e-5, atol=1e-6)
        if slow[number] is not None:
            torch.testing.assert_close(first[number], slow[number], rtol=1e-10, atol=1e-12)


def token_by_token_call(made: SparseFFN, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = made

        def forward(self, tokens: Tensor) -> Tensor:
            return token_by_token(self.made, tokens)[0]

    return functional_call(Slow(), {f"made.{name}": p for name, p in parameters.items()}, (x,))


@pytest.mark.parametrize("case", CASES[:6] + CASES[9:], ids=NAMES[:6] + NAMES[9:])
def test_vmap_says_and_learns_the_same_for_each_of_its_batches(case: dict) -> None:
    made = layer(**case)
    theta, xs = {name: p.detach() for name, p in made.named_parameters()}, torch.stack([inputs(seed) for seed in (1, 2, 3)])

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(made, p, (x,)).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(theta, xs)
    torch.testing.assert_close(vmap(made)(xs), torch.stack([made(x) for x in xs]), rtol=1e-12, atol=1e-12)
    for number, x in enumerate(xs):
        for name, alone in grad(loss)(theta, x).items():
            torch.testing.assert_close(together[name][number], alone, rtol=1e-10, atol=1e-12)


def test_capacity_is_k_times_the_rounded_share_with_its_factor() -> None:
    assert [capacity(10, 4, 1, 1.0), capacity(10, 4, 2, 1.5), capacity(12, 4, 1, 1.5)] == [3, 8, 4]


def test_batch_prioritised_routing_serves_the_surest_tokens_and_first_choices_before_second_ones() -> None:
    made = layer(top_k=2, router="linear", capacity_factor=0.5)  # 2 x int(0.5 x 6) = 6 places each
    x = inputs()
    with routings(made) as found:
        made(x)
    routing = found[""]
    assert routing.served is not None
    assert routing.load.tolist() == [min(6, int((routing.experts == e).sum())) for e in range(E)]
    surest = routing.logits.softmax(dim=1).amax(dim=1)
    for e in range(E):
        for place in range(2):
            asked = routing.experts[:, place] == e
            yes, no = surest[asked & routing.served[:, place]], surest[asked & ~routing.served[:, place]]
            assert not len(yes) or not len(no) or yes.min() >= no.max()
        first_turned_away = ((routing.experts[:, 0] == e) & ~routing.served[:, 0]).any()
        second_served = ((routing.experts[:, 1] == e) & routing.served[:, 1]).any()
        assert not (first_turned_away and second_served)


def test_without_capacity_tokens_do_not_see_each_other() -> None:
    made, x = layer(top_k=2), inputs()
    torch.testing.assert_close(made(x)[7:9], made(x[7:9]), rtol=1e-12, atol=1e-13)


def test_balance_is_0_for_even_use_and_the_number_of_experts_less_one_for_one_expert_alone() -> None:
    logits = 50 * torch.eye(E, dtype=torch.float64).repeat(2, 1)
    alone = torch.zeros(8, E, dtype=torch.float64)
    alone[:, 1] = 50.0
    gates, noise = torch.ones(8, 1, dtype=torch.float64), 1e3 * E  # so much that load is even too
    for each, importance in ((logits, 0.0), (alone, float(E))):  # the variance is that of a sample
        routing = Routing(each, each, each.argmax(dim=1, keepdim=True), gates, None, noise)
        assert balance_loss(routing).item() == pytest.approx(importance / 2, abs=1e-3)


def test_noise_is_for_training_only_and_follows_torchs_generator() -> None:
    made, x = layer(top_k=1, router="linear", noise=4.0), inputs()
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(made(x))
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])
    made.eval()
    state = torch.random.get_rng_state()
    assert torch.equal(made(x), made(x))
    assert torch.equal(state, torch.random.get_rng_state())


def test_dropout_drops_hidden_units_in_training_and_keeps_the_mean() -> None:
    made, x = layer(dropout=0.5), inputs()
    many = torch.stack([made(x) for _ in range(2000)])
    assert many.std(dim=0).min() > 0
    torch.testing.assert_close(many.mean(dim=0), made.eval()(x), rtol=0.2, atol=0.3)


def test_under_autocast_the_router_decides_in_float32_and_products_are_coarse() -> None:
    made = layer(top_k=2).float()
    x = inputs().float()
    with routings(made) as exact:
        expected = made(x)
    with torch.autocast("cpu", torch.bfloat16), routings(made) as found:
        said = made(x)
    assert found[""].logits.dtype == torch.float32
    assert torch.equal(found[""].logits, exact[""].logits)
    assert said.dtype == torch.float32
    assert 0 < (said - expected).abs().max() < 0.02 * expected.abs().max()
    half = made.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_a_routing_is_kept_only_when_asked_for() -> None:
    made, x = layer(), inputs()
    with routings(made) as found:
        made(x)
        made(inputs(2))
    made(inputs(3))
    assert list(found) == [""]
    assert torch.equal(found[""].logits, logits_of(made, inputs(2))) or torch.allclose(
        found[""].logits, logits_of(made, inputs(2)), rtol=1e-12
    )
    assert found[""].load.sum() == T


def test_more_chosen_than_there_are_and_balance_without_noise_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k must be 1 to 4"):
        layer(top_k=5)
    with pytest.raises(ValueError, match="balance_weight"):
        SparseFFN(
            Experts(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 4, 3), torch.zeros(2, 3)),
            act=nn.GELU(),
            router=None,
            top_k=1,
            weighting="one",
            balance_weight=0.1,
        )
