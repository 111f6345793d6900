import torch

from fslora.data.lazy import LazyExamples, NamedExamples
from fslora.data.tasks import Examples


def test_only_who_is_asked_for_is_tokenised_and_once():
    asked = []

    def encode(client):
        asked.append(client)
        return Examples({"input_ids": torch.full((client + 1, 2), client)})

    clients = LazyExamples(4, encode)
    named = NamedExamples(["a", "b", "c", "d"], clients)
    assert (len(clients), len(named), list(named)) == (4, 4, ["a", "b", "c", "d"])
    assert asked == []
    assert named["c"] is clients[2] is clients[-2]
    assert asked == [2]
    assert [len(examples) for examples in clients] == [1, 2, 3, 4]
    assert asked == [2, 0, 1, 3]
    assert [len(examples) for examples in clients] == [1, 2, 3, 4]
    assert asked == [2, 0, 1, 3, 0, 1, 3], "a pass over all keeps nothing more"
    assert [len(examples) for examples in clients[1:3]] == [2, 3]
