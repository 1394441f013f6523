// Browsers start no worker for a page that is opened as a file: run the search in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      const inside = (this.inside = frame.contentWindow)
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = (...urls) => Promise.all(urls.map((each) => load(inside, each)))
      this.ready = load(inside, url)
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
  window.Worker = window.IFrameWorker
}

function load(target, url) {
  return new Promise((resolve, reject) => {
    const script = target.document.createElement("script")
    script.src = url
    script.onload = resolve
    script.onerror = reject
    target.document.body.append(script)
  })
}
