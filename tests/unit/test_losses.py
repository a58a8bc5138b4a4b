"""Losses against numbers worked out by hand."""

import pytest
import torch

from sppo_ray.losses import LOSSES, lag_weight, sppo, sppo_single, winner_and_loser


def close(actual: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected))


def test_sppo_pair_by_hand() -> None:
    # eta = 10. Example 1: targets 10 (0.8 - 0.5) = 3 and 10 (0.3 - 0.5) = -2; delta (1, -1)
    #   1/2 [(1 - 3)^2 + (-1 + 2)^2] = 1/2 [4 + 1] = 2.5
    # Example 2: targets 0 and 0; delta (-2, 4):  1/2 [4 + 16] = 10
    delta = torch.tensor([[1.0, -1.0], [-2.0, 4.0]])
    p_hat = torch.tensor([[0.8, 0.3], [0.5, 0.5]])
    loss, metrics = sppo(delta, p_hat, torch.tensor([0.9, 0.5]), eta=10.0)
    close(loss, 2.5, 10.0)
    close(metrics["delta_w"], 1.0, -2.0)
    close(metrics["delta_l"], -1.0, 4.0)
    close(metrics["target_w"], 3.0, 0.0)
    close(metrics["target_l"], -2.0, 0.0)
    close(metrics["margin"], 2.0, -6.0)
    close(metrics["margin_accuracy"], 1.0, 0.0)


def test_sppo_single_by_hand() -> None:
    # eta = 10, p = 0.9: push 4.  1/2 [(1 - 4)^2 + (-1 + 4)^2] = 1/2 [9 + 9] = 9. P_hat is not used.
    loss, metrics = sppo_single(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.1, 0.2]]), torch.tensor([0.9]), eta=10.0)
    close(loss, 9.0)
    close(metrics["target_w"], 4.0)
    close(metrics["target_l"], -4.0)


def test_sppo_keeps_all_responses_as_a_mean() -> None:
    # eta = 10, P_hat (0.5, 0.9, 0.1): targets (0, 4, -4); delta (1, 2, 0): (1 + 4 + 16) / 3 = 7.
    # Winner is response 1 and loser response 2: margin 2 - 0.
    loss, metrics = sppo(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.5, 0.9, 0.1]]), torch.tensor([0.5]), 10.0)
    close(loss, 7.0)
    close(metrics["delta_w"], 2.0)
    close(metrics["target_l"], -4.0)
    close(metrics["margin"], 2.0)


def test_first_loss_of_a_paper_run_is_huge_and_right() -> None:
    # eta = 1000, P_hat 0.9 and 0.1, delta 0: 1/2 [400^2 + 400^2] = 160,000 (a user's log shows 139,721).
    loss, _ = sppo(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]), torch.tensor([0.9]), 1000.0)
    close(loss, 160_000.0)


def test_gradient_pushes_towards_the_target() -> None:
    # d loss / d delta_w = delta_w - target_w = 1 - 3, d loss / d delta_l = -1 + 2.
    delta = torch.tensor([[1.0, -1.0]], requires_grad=True)
    loss, metrics = sppo(delta, torch.tensor([[0.8, 0.3]]), torch.tensor([0.9]), 10.0)
    loss.sum().backward()
    torch.testing.assert_close(delta.grad, torch.tensor([[-2.0, 1.0]]))
    assert not any(values.requires_grad for values in metrics.values())


def test_every_loss_gives_one_value_per_example_and_the_same_metrics() -> None:
    names = set()
    for loss_of in LOSSES.values():
        loss, metrics = loss_of(torch.zeros(3, 2), torch.full((3, 2), 0.5), torch.full((3,), 0.5), 1.0, None)
        assert loss.shape == (3,)
        assert all(values.shape == (3,) for values in metrics.values())
        names.add(frozenset(metrics))
    assert len(names) == 1


def test_single_refuses_more_than_a_pair() -> None:
    with pytest.raises(ValueError, match="3 responses"):
        sppo_single(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1), 1.0)


def test_a_pair_is_winner_first_whatever_p_hat_says() -> None:
    assert winner_and_loser((0.4, 0.6)) == (0, 1)
    assert winner_and_loser((0.4, 0.6, 0.1)) == (1, 2)


def test_a_clipped_target_by_hand() -> None:
    # eta = 10: targets 3 and -2 are clipped to 2.5 and -2; delta (1, -1): 1/2 [1.5^2 + 1] = 1.625
    delta, p_hat, p_pair = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.8, 0.3]]), torch.tensor([0.9])
    loss, metrics = sppo(delta, p_hat, p_pair, 10.0, target_clip=2.5)
    close(loss, 1.625)
    close(metrics["target_w"], 2.5)
    close(metrics["target_l"], -2.0)
    # sppo_single: the push of 4 is clipped to 2.5: 1/2 [(1 - 2.5)^2 + (-1 + 2.5)^2] = 2.25
    loss, metrics = sppo_single(delta, p_hat, p_pair, 10.0, target_clip=2.5)
    close(loss, 2.25)
    close(metrics["target_l"], -2.5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_clip_that_is_never_reached_changes_no_bit(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    delta, p_hat = 20 * torch.rand(50, 2, generator=generator), torch.rand(50, 2, generator=generator)
    arguments = delta, p_hat, p_hat[:, 0], 1000.0
    (free, _), (clipped, _) = LOSSES[name](*arguments, None), LOSSES[name](*arguments, 500.0)
    assert torch.equal(free, clipped)


def test_lag_weight() -> None:
    staleness = torch.tensor([0, 1, 3])
    close(lag_weight(staleness, 0.5), 1.0, 0.5, 0.125)
    assert torch.equal(lag_weight(staleness, 1.0), torch.ones(3))  # exactly: the default must change no bit
