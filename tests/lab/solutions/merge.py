from pagelens.lab import MiniMm, Vma


def can_merge(mm: MiniMm, neighbour: Vma, new: Vma) -> bool:
    if neighbour.flags != new.flags or neighbour.file != new.file or neighbour.fork_child:
        return False
    if not new.file:
        return True
    if neighbour.end == new.start:
        return neighbour.pgoff + neighbour.pages == new.pgoff
    return new.pgoff + new.pages == neighbour.pgoff
