"""Bodies of the requests, as `/openapi.json` describes them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Body(BaseModel):
    """A body without unknown keys and without values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`, as the API of OpenAI has it, with images in the place of texts."""

    input: str | list[str] = Field(description="An image, or several: each base64 or a data URI of an image file.")
    model: str = Field(description="What `/v1/models` calls the model.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or base64 of little-endian float32."
    )
    dimensions: int | None = Field(None, description="How many of the first dimensions, of those that the model has.")
    user: str | None = Field(None, description="Not used.")


class SearchBody(Body):
    """`POST /search`: a query, and what is searched for."""

    image: str | None = Field(None, description="An image as in `/v1/embeddings`.")
    vector: list[Annotated[float, Field(strict=False, allow_inf_nan=False)]] | None = Field(
        None, description="An embedding by the model of the index."
    )
    k: int = Field(5, ge=1, description="Neighbours.")
    domain: str | None = Field(None, description="Search among the images of this domain only.")
    thumbnails: bool = Field(False, description="Whether neighbours come with a small JPEG, in base64.")

    @model_validator(mode="after")
    def _has_one_query(self) -> "SearchBody":
        if (self.image is None) == (self.vector is None):
            raise ValueError("give one of `image` and `vector`")
        return self
