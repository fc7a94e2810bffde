"""A page with Gradio, for a Space or this machine: draw, edit, caption.

pip install gradio && python integrations/gradio_app.py small-64
"""

import sys

import PIL.Image

import transfuse
from transfuse.images import decode_image, fit


def functions(model: str):
    """Return (draw, edit, caption) of a model."""
    pipe = transfuse.load(model)

    def fitted(image: PIL.Image.Image) -> PIL.Image.Image:
        return PIL.Image.fromarray(fit(decode_image(image), pipe.exported.image_size))

    def draw(prompt: str, negative: str, seed: int) -> PIL.Image.Image:
        return pipe(prompt, negative_prompt=negative or None, generator=int(seed)).images[0]

    def edit(image: PIL.Image.Image, instruction: str, seed: int) -> PIL.Image.Image:
        return pipe(instruction, image=fitted(image), generator=int(seed)).images[0]

    def caption(image: PIL.Image.Image) -> str:
        return pipe.caption(fitted(image))[0]

    return draw, edit, caption


if __name__ == "__main__":
    import gradio as gr

    draw, edit, caption = functions(sys.argv[1] if len(sys.argv) > 1 else "small-64")
    picture, seed = gr.Image(type="pil"), gr.Number(0, label="seed", precision=0)
    tabs = [
        gr.Interface(draw, [gr.Text(label="prompt"), gr.Text(label="negative prompt"), seed], "image"),
        gr.Interface(edit, [picture, gr.Text(label="instruction"), seed], "image"),
        gr.Interface(caption, [picture], "text"),
    ]
    gr.TabbedInterface(tabs, ["Draw", "Edit", "Caption"], title="Transfuse").launch()
