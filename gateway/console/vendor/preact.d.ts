export { render } from "preact";
export { useEffect, useRef, useState } from "preact/hooks";
export { effect, signal } from "@preact/signals";
export { html } from "htm/preact";
