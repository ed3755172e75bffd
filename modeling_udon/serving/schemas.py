"""Bodies of the requests, as `/openapi.json` describes them."""

from typing import Annotated, Any, Literal

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
    row: int | None = Field(None, description="An image of the index by its `row`; itself is left out.")
    id: str | None = Field(None, description="An image of the index by its `id`; it and its copies are left out.")
    k: int = Field(5, ge=1, description="Neighbours.")
    domain: str | None = Field(None, description="Search among the images of this domain only.")
    where: str | None = Field(None, description="Search among the images for which this SQL condition is true.")
    group_by: str | None = Field(None, description="A column of whose values each is found once.")
    thumbnails: bool = Field(False, description="Whether neighbours come with a small JPEG, in base64.")

    @model_validator(mode="after")
    def _has_one_query(self) -> "SearchBody":
        if sum(query is not None for query in (self.image, self.vector, self.row, self.id)) != 1:
            raise ValueError("give one of `image`, `vector`, `row` and `id`")
        return self


class NewImage(Body):
    """An image that is added to the index."""

    image: str = Field(description="The image as in `/v1/embeddings`.")
    id: str | None = Field(None, min_length=1, description="By default the beginning of its digest.")
    path: str | None = Field(None, min_length=1, description="What it is called in answers; by default its id.")
    domain: str | None = Field(None, description="Its domain.")
    columns: dict[str, Any] = Field({}, description="Values of further columns.")


class AddBody(Body):
    """`POST /index/add`."""

    images: list[NewImage] = Field(min_length=1, description="The images.")
    replace: bool = Field(False, description="Whether images of the index with the same ids are removed.")


class RemoveBody(Body):
    """`POST /index/remove`: what is removed, by one of three names."""

    ids: list[str] | None = Field(None, description="All images with one of these ids.")
    rows: list[int] | None = Field(None, description="Images by their `row`.")
    where: str | None = Field(None, description="All images for which this SQL condition is true.")
    missing_ok: bool = Field(False, description="Whether an id that is not there is no error.")

    @model_validator(mode="after")
    def _has_one_name(self) -> "RemoveBody":
        if sum(name is not None for name in (self.ids, self.rows, self.where)) != 1:
            raise ValueError("give one of `ids`, `rows` and `where`")
        return self
