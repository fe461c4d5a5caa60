"""Tiny networks in float64 and episodes of random images, for tests of ARM."""

import torch
from torch import Tensor, nn

from dmoe.models.networks import Network
from dmoe.tasks import Task

G, S, D, K = 2, 5, 4, 3
TASK = Task("multiclass", num_outputs=K)


def network(channels: int = 1) -> Network:
    """For images of 6x6; its running statistics are not those it starts with. Smooth, so that differences are exact."""
    features = nn.Sequential(
        nn.Conv2d(channels, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, D), nn.BatchNorm1d(D)
    )
    for norm in (features[1], features[5]):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return Network(features=features, head=nn.Linear(D, K)).double()


def episodes() -> tuple[Tensor, list[Tensor]]:
    """Support images of two episodes, and query images: three and two."""
    return torch.randn(G, S, 1, 6, 6, dtype=torch.float64), [torch.randn(n, 1, 6, 6, dtype=torch.float64) for n in (3, 2)]


def refuse_gradient_that_differs(module: nn.Module, support: Tensor, query: list[Tensor]) -> None:
    """The gradient of a random function of the query's logits, by all parameters, against central differences along a direction."""
    weight = torch.randn(sum(map(len, query)), K, dtype=torch.float64)
    parameters = list(module.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def value() -> Tensor:
        return (module.query_logits(support, query) * weight).sum()

    found = torch.autograd.grad(value(), parameters)
    slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(step * d)
        values.append(value().item())
    assert all(bool(gradient.any()) for gradient in found)
    torch.testing.assert_close(slope.item(), (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-8)
