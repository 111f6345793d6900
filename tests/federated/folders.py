"""What a run or a comparison left, to be compared with what another did."""

from pathlib import Path

from fslora import checkpoint


def records(folder):
    """The run's records without what a clock measured."""
    rows = checkpoint.read_records(Path(folder))
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def outcome(folder):
    state = checkpoint.load_state(Path(folder))
    tensors = [t for name in sorted(state.adapters) for t in state.adapters[name]]
    tensors += [t for _, t in sorted(state.extras.items()) + sorted(state.optimizer.items())]
    return records(folder), b"".join(t.numpy().tobytes() for t in tensors)


def tree(folder):
    """Every file of the runs, with its content and time of writing."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and {"runs", "search"} & set(path.relative_to(folder).parts)
    }
