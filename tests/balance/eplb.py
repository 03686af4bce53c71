"""DeepSeek's load balancer as its README and paper describe it, one item at a time: the oracle.

Its packing of single items, heaviest first, into ranks with room; two replicas of an expert may
share a rank. Global where hosts do not divide groups, hierarchical where they do. tests/balance
holds `packing.plan` against it; production code never imports it.

Source: README of github.com/deepseek-ai/EPLB; DeepSeek-V3 (arXiv:2412.19437), section 3.4.
"""


def plan(load_LE, num_slots, num_ranks, num_hosts=1, num_groups=1):
  """Returns lists expert_LP."""
  if num_groups % num_hosts:
    num_hosts = num_groups = 1
  return [one_layer([float(w) for w in row], num_slots, num_ranks, num_hosts, num_groups)
          for row in load_LE]  # fmt: skip


def one_layer(load_E, num_slots, num_ranks, num_hosts, num_groups):
  size = len(load_E) // num_groups
  groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
  hosts = pack([sum(load_E[e] for e in group) for group in groups], num_hosts)
  expert_P = []
  for host in hosts:
    experts = [e for g in host for e in groups[g]]
    replicas = list(experts)
    while len(replicas) < num_slots // num_hosts:
      replicas.append(max(experts, key=lambda e: load_E[e] / replicas.count(e)))
    each = [load_E[e] / replicas.count(e) for e in replicas]
    for rank in pack(each, num_ranks // num_hosts):
      expert_P += [replicas[i] for i in rank]
  return expert_P


def pack(weights, num_packs):
  """Returns the items of each pack, each with the same number."""
  room, packs = len(weights) // num_packs, [[] for _ in range(num_packs)]
  if room == 1:
    return [[i] for i in range(len(weights))]
  loads = [0.0] * num_packs
  for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
    pack_id = min((p for p in range(num_packs) if len(packs[p]) < room), key=loads.__getitem__)
    packs[pack_id].append(item)
    loads[pack_id] += weights[item]
  return packs
