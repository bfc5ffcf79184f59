import jax
import jax.numpy as jnp

from cbp_jax.nets import LeNet, lenet


def test_the_network_of_label_permuted_cifar10():
    params = jax.jit(LeNet(10).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    fan_ins = {"Conv_0": 75, "Conv_1": 150, "Dense_0": 400, "Dense_1": 120, "Dense_2": 84}
    assert [params[name]["kernel"].shape[-1] for name in fan_ins] == [6, 16, 120, 84, 10]
    for name, fan_in in fan_ins.items():
        assert params[name]["kernel"][..., 0].size == fan_in
        for array in params[name].values():
            assert 0.5 / fan_in**0.5 < jnp.abs(array).max() <= 1 / fan_in**0.5


def test_its_attributes_can_be_changed():
    assert lenet(47, activation="tanh", hidden=(7,)) == LeNet(47, activation="tanh", hidden=(7,))
    assert lenet(47).hidden == (120, 84)
