"""Rows as one padded batch. Batches of whole data sets are in test_loaders."""

from utils.data.collate import pad


def test_pad():
    right, lengths = pad([[1, 2, 3], [4]], 0)
    left, _ = pad([[1, 2, 3], [4]], 0, left=True)
    assert right.tolist() == [[1, 2, 3], [4, 0, 0]] and left.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert lengths.tolist() == [3, 1]
