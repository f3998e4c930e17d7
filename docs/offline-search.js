// Search in pages that a browser reads from a folder: there it starts no workers, so the code of the
// worker runs in a frame of the page.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const code = frame.contentDocument.createElement("script")
      code.src = url
      const inside = frame.contentWindow
      inside.postMessage = (data) => {
        const message = new MessageEvent("message", { data })
        this.dispatchEvent(message)
        this.onmessage?.(message)
      }
      this.ready = new Promise((resolve) => code.addEventListener("load", () => resolve(inside)))
      frame.contentDocument.body.append(code)
      this.frame = frame
    }

    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
