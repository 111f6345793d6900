"""The prototypes compute what they say, in the interpreter, and compile for one target."""

import pytest
import torch

from fslora_kernels import aot
from fslora_kernels._dispatch import interpreting

pytest.importorskip("triton")
from benchmarks import prototypes

TOKENS, IN, OUT, RANKS, PADDED = 70, 48, 80, 5, 16


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1 from the start")
class TestInterpreted:
    def test_dh_and_db_in_one_pass(self):
        dy, b = draw(TOKENS, OUT, seed=0), draw(RANKS, OUT, seed=1)
        h = torch.zeros(TOKENS, PADDED)
        h[:, :RANKS] = draw(TOKENS, RANKS, seed=2)
        dh, db = torch.zeros(TOKENS, PADDED), torch.full_like(b, torch.nan)
        prototypes.dh_db_kernel[(3,)](dy, h, b, dh, db, TOKENS, RANKS, OUT, T=32, F=32, P=PADDED)
        torch.testing.assert_close(dh[:, :RANKS], dy @ b.T)
        torch.testing.assert_close(db, h[:, :RANKS].T @ dy)

    def test_the_base_product_with_the_delta_in_its_epilogue(self):
        x, weight, b = draw(TOKENS, IN, seed=0), draw(OUT, IN, seed=1), draw(RANKS, OUT, seed=2)
        h = torch.zeros(TOKENS, PADDED)
        h[:, :RANKS] = draw(TOKENS, RANKS, seed=3)
        y = torch.full((TOKENS, OUT), torch.nan)
        prototypes.base_delta_kernel[(3, 3)](
            x, weight, h, b, y, TOKENS, RANKS, IN, OUT, T=32, E=32, D=32, P=PADDED
        )
        torch.testing.assert_close(y, x @ weight.T + h[:, :RANKS] @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(interpreting(), reason="nothing is compiled under TRITON_INTERPRET=1")
def test_they_compile_without_spills(capsys):
    assert prototypes.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8 * len(aot.TARGETS)
