"""Log-linear sparse attention from its definition, slow and plainly right."""

import math

import torch


def explicit(method, where, q, k, v, scale, bias=None):
    """The attention of one head from its definition: every key of every level and of the text beside each other, in
    float64, masked to what each query sees, with the patches chosen by brute force. q, k, v [N, D] -> [N, D]."""
    plan, block = method.plan(where), method.block
    q, k, v = (x.double() for x in (q, k, v))
    text = torch.ones(where.total, dtype=torch.bool)
    text[where.image] = False
    order = torch.arange(plan.image) if plan.order is None else plan.order
    levels, spans = [[x[where.image][order] for x in (q, k, v)]], [[[t] for t in range(plan.image)]]
    for _ in range(plan.pyramid.levels):
        below = spans[-1]
        spans.append([sum(below[i : i + block], []) for i in range(0, len(below), block)])
        levels.append([torch.stack([x[t].mean(0) for t in spans[-1]]) for x in levels[0]])
    seen = visible(plan, method, [(mq @ mk.T).tolist() for mq, mk, _ in levels], [len(x) for x in spans])
    keys, values = (torch.cat([level[i] for level in levels] + [x[text]]) for i, x in ((1, k), (2, v)))
    counts = [math.log(len(t)) if method.reweight else 0.0 for level in spans for t in level]
    added = torch.zeros(where.total) if bias is None else bias
    weight = torch.cat([torch.tensor(counts), added[text]]).double()
    live = torch.cat([seen, torch.ones(plan.image, int(text.sum()), dtype=torch.bool)], 1)
    logits = (scale * levels[0][0] @ keys.T + weight).masked_fill(~live, -math.inf)
    out = torch.empty_like(q)
    out[where.image.start + order] = logits.softmax(-1) @ values
    out[text] = (scale * q[text] @ k.T + added).softmax(-1) @ v
    return out


def visible(plan, method, scores, sizes):
    """bool [tokens, nodes of all levels from 0]: what each image query sees, from the scores between nodes."""
    block, top = method.block, len(sizes) - 1
    starts = [sum(sizes[:level]) for level in range(len(sizes))]
    chosen = [{} for _ in sizes]

    def children(level, node):
        """Nodes of `level` below what the node's parent chose; all of the coarsest."""
        if level == top:
            return range(sizes[top])
        return [
            c
            for p in sorted(chosen[level + 1][node // block])
            for c in range(p * block, min((p + 1) * block, sizes[level]))
        ]

    for level in range(top, 0, -1):
        for node in range(sizes[level]):
            best = sorted(children(level, node), key=lambda c: (-scores[level][node][c], c))
            chosen[level][node] = set(best[: plan.topk])
    seen = torch.zeros(sizes[0], sum(sizes), dtype=torch.bool)
    for i in range(sizes[0]):
        seen[i, children(0, i)] = True
        for level in range(1, len(sizes)) if method.enrich else ():
            node = i // block**level
            own = chosen[level][node] if method.exclude_selected else ()
            seen[i, [starts[level] + c for c in children(level, node) if c not in own]] = True
    return seen
