"""Every printed form of replica groups names the same devices."""

import pytest

from moe_jax.rehearse import groups

MESH = {"stage": 2, "expert": 2, "tensor": 2}


@pytest.mark.parametrize(
  ("text", "members", "axes"),
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ((0, 1), (2, 3), (4, 5), (6, 7)), "tensor"),
    ("{{0,4},{1,5},{2,6},{3,7}}", ((0, 4), (1, 5), (2, 6), (3, 7)), "stage"),
    ("{}", (tuple(range(8)),), "stage+expert+tensor"),
    ("[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7)), "tensor"),
    ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7)), "expert"),
    (
      "mesh['stage'=2,'expert'=2,'tensor'=2] {'expert','tensor'}",
      ((0, 1, 2, 3), (4, 5, 6, 7)),
      "expert+tensor",
    ),
    (
      "mesh['stage'=2,'expert'=2,'tensor'=2] {'tensor','stage'}",
      ((0, 4, 1, 5), (2, 6, 3, 7)),
      "stage+tensor",
    ),
    # Devices [expert, stage, tensor]: the axis that is 2 is expert.
    (
      "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}",
      ((0, 2), (1, 3), (4, 6), (5, 7)),
      "expert",
    ),
    (
      "mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'a'}",
      ((7, 3), (6, 2), (5, 1), (4, 0)),
      "stage",
    ),
  ],
)
def test_replica_groups(text, members, axes):
  found = groups.parse(f"channel_id=1, replica_groups={text}, use_global_device_ids=true", MESH)
  assert found.members == members
  assert "+".join(found.axes) == axes
  assert found.is_whole


def test_source_target_pairs():
  found = groups.parse("channel_id=1, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", MESH)
  assert found.axes == ("stage",) and found.size == 2


def test_a_part_of_an_axis_is_not_whole():
  mesh = {"stage": 1, "expert": 4, "tensor": 2}
  found = groups.parse("replica_groups={{0,2},{1,3},{4,6},{5,7}}", mesh)
  assert found.axes == ("expert",) and not found.is_whole


def test_hosts():
  found = groups.parse("replica_groups={{0,1,2,3},{4,5,6,7}}", MESH)
  assert found.hosts(8) == (1, 4)
  assert found.hosts(4) == (1, 4)
  assert found.hosts(2) == (2, 2)
  assert found.hosts(1) == (4, 1)


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("dimensions={0}", "no replica groups"),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", "form that is not known"),
    ("replica_groups={{0,8}}", "outside of 8"),
  ],
)
def test_what_is_not_known_is_refused(text, match):
  with pytest.raises(ValueError, match=match):
    groups.parse(text, MESH)
