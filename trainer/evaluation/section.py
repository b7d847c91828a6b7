"""What the parts of a job share: each is read-only and refuses a key that it does not know."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of a job: read-only, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
