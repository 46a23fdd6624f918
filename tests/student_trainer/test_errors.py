"""The error tree: also stdlib types, and picklable across processes."""

import pickle

import pytest

from student_trainer import errors

ALL = [
    one
    for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, errors.TeacherError)
]


@pytest.mark.parametrize("kind", ALL)
def test_errors_survive_pickling(kind):
    again = pickle.loads(pickle.dumps(kind("words")))
    assert type(again) is kind
    assert str(again) == "words"


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (errors.TeacherUnavailable, ConnectionError),
        (errors.TeacherTimeout, TimeoutError),
        (errors.AccessDenied, PermissionError),
        (errors.InvalidRequest, ValueError),
        (errors.IncompatibleTeacher, ValueError),
        (errors.UnsuitableTargets, ValueError),
        (errors.ForkedClient, RuntimeError),
    ],
)
def test_errors_are_also_standard_ones(kind, standard):
    assert issubclass(kind, standard)


@pytest.mark.parametrize("kind", ALL)
def test_the_tree_in_the_docstring_names_every_error(kind):
    assert kind.__name__ in (errors.__doc__ or "")
