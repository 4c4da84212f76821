// The small parts that every page is made of.
import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { percent } from "../i18n/format.js";
import { need, t } from "../i18n/texts.js";
import { may } from "../state/session.js";
import { Icon } from "./icons.js";

/**
 * @param {{kind?: "primary" | "plain" | "danger" | "quiet", busy?: boolean, disabled?: boolean, type?: string,
 *   onClick?: (event: Event) => void, icon?: any, label?: string, needs?: import("../state/session.js").Role,
 *   children?: any, class?: string}} props `label` names a button without text; `needs` is the role it takes
 */
export function Button({ kind = "plain", busy = false, disabled = false, type = "button", icon, label, needs, children, ...rest }) {
  const lacks = needs && !may(needs) && t("role.needs", { role: t(`role.${needs}`) });
  return html`<button
    ...${rest}
    type=${type}
    class=${`button ${kind} ${label ? "only-icon" : ""} ${rest.class ?? ""}`}
    disabled=${disabled || busy || Boolean(lacks)}
    aria-busy=${busy}
    aria-label=${label}
    aria-description=${lacks || undefined}
    title=${lacks || label}
  >
    ${icon && html`<${Icon} name=${icon} />`}${children}
  </button>`;
}

/** @param {{title?: any, actions?: any, children?: any, class?: string, id?: string}} props */
export function Card({ title, actions, children, id, ...rest }) {
  return html`<section class=${`card ${rest.class ?? ""}`} aria-labelledby=${title && id ? id : undefined}>
    ${title &&
    html`<header class="row spread"><h2 id=${id}>${title}</h2>${actions && html`<div class="row">${actions}</div>`}</header>`}
    ${children}
  </section>`;
}

/** A state in a word. @param {{tone: string, children?: any, title?: string}} props */
export function Chip({ tone, children, title }) {
  return html`<span class=${`chip ${tone}`} title=${title}><span class="dot"></span>${children}</span>`;
}

/** One sentence and one thing to do, where there is nothing yet. @param {{text: string, children?: any}} props */
export function Empty({ text, children }) {
  return html`<div class="empty"><p>${text}</p>${children}</div>`;
}

/** Grey bars in place of what is being read, if that takes a while. @param {{lines?: number}} props */
export function Skeleton({ lines = 3 }) {
  const [shown, show] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => show(true), 300);
    return () => clearTimeout(timer);
  }, []);
  if (!shown) return null;
  return html`<div class="skeleton" aria-hidden="true">${Array.from({ length: lines }, () => html`<div></div>`)}</div>`;
}

/** What went wrong, where it happened. @param {{error: any, onRetry?: () => void}} props */
export function Problem({ error, onRetry }) {
  const violations = error.violations ?? [];
  return html`<div class="problem" role="alert">
    <div class="row">
      <${Icon} name="warning" />
      <strong>${errorTitle(error)}</strong>
    </div>
    ${error.message && html`<p>${error.message}</p>`}
    ${violations.length > 0 &&
    html`<ul>
      ${violations
        .slice(0, 10)
        .map((/** @type {any} */ one) => html`<li><code>${one.field}</code> ${one.description}</li>`)}
      ${violations.length > 10 && html`<li>${t("error.more", { count: violations.length - 10 })}</li>`}
    </ul>`}
    <div class="row">
      ${onRetry && html`<${Button} icon="restore" onClick=${onRetry}>${t("action.retry")}<//>`}
      ${error.requestId && html`<span class="muted small mono">${t("error.requestId")} ${error.requestId}</span>`}
    </div>
  </div>`;
}

/** What a resource failed of, as a call would have. @param {{failure: any}} props */
export function Failed({ failure }) {
  const { message, details = [] } = failure.status;
  const violations = details.flatMap((/** @type {any} */ one) => one.fieldViolations ?? []);
  return html`<${Problem} error=${{ status: "FAILED", message, violations }} />`;
}

/** @param {any} error */
function errorTitle(error) {
  if (error.code === 0) return t("error.unreachable");
  return t(`error.${error.status}`) || t("error.other");
}

/**
 * What `useLoad` has: the content, what went wrong, or a skeleton.
 *
 * @param {{state: any, children?: any, lines?: number}} props
 */
export function Loaded({ state, children, lines = 3 }) {
  return html`${state.error && html`<${Problem} error=${state.error} onRetry=${state.reload} />`}
  ${state.data === undefined ? !state.error && html`<${Skeleton} lines=${lines} />` : children(state.data)}`;
}

/**
 * A dialog of the browser: keeps the focus, gives it back, closes with Escape.
 *
 * @param {{title: any, onClose: () => void, children?: any, wide?: boolean}} props
 */
export function Dialog({ title, onClose, children, wide = false }) {
  const dialog = useRef(/** @type {any} */ (null));
  useEffect(() => {
    const before = /** @type {HTMLElement | null} */ (document.activeElement);
    dialog.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  return html`<dialog
    ref=${dialog}
    class=${wide ? "wide" : ""}
    aria-labelledby="dialog-title"
    onClose=${onClose}
    onMouseDown=${(/** @type {any} */ event) => event.target === dialog.current && dialog.current.close()}
  >
    <div class="dialog-body stack">
      <header class="row spread">
        <h2 id="dialog-title">${title}</h2>
        <${Button} kind="quiet" icon="close" label=${t("action.close")} onClick=${() => dialog.current.close()} />
      </header>
      ${children}
    </div>
  </dialog>`;
}

/**
 * A question mark that opens an explanation.
 *
 * @param {{about: string, text: any}} props `text` is the key of a text, which is loaded when it is asked for, or content
 */
export function Help({ about, text }) {
  const [shown, show] = useState(typeof text !== "string");
  return html`<details class="help" onToggle=${() => shown || need("help").then(() => show(true))}>
    <summary aria-label=${t("help.about", { about })} title=${t("help.about", { about })}><${Icon} name="help" size=${16} /></summary>
    <div class="help-text">${typeof text !== "string" ? text : shown && paragraphs(text)}</div>
  </details>`;
}

/** @param {string} key */
const paragraphs = (key) => t(key).split("\n").map((text) => html`<p>${text}</p>`);

/**
 * @param {{label: any, about?: string, help?: any, hint?: any, error?: any, children?: any, for: string}} props `help` as
 *   the text of `Help`, which is named after the label or `about`
 */
export function Field({ label, about = label, help, hint, error, children, ...rest }) {
  return html`<div class="field">
    <div class="row label"><label for=${rest.for}>${label}</label>${help && html`<${Help} about=${about} text=${help} />`}</div>
    ${children}
    ${hint && html`<p class="muted small" id=${`${rest.for}-hint`}>${hint}</p>`}
    ${error && html`<p class="bad small" role="alert">${error}</p>`}
  </div>`;
}

/** How far something is; without a value it is under way. @param {{value?: number, label: string}} props */
export function Progress({ value, label }) {
  return html`<progress max="100" value=${value} aria-label=${label}></progress>`;
}

/**
 * Tabs of one page; the arrow keys move between them.
 *
 * @param {{tabs: {id: string, label: any}[], current: string, onChoose: (id: string) => void, label: string}} props
 */
export function Tabs({ tabs, current, onChoose, label }) {
  const move = (/** @type {any} */ event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[/** @type {string} */ (event.key)];
    if (!step) return;
    const index = tabs.findIndex((tab) => tab.id === current);
    const next = tabs[(index + step + tabs.length) % tabs.length];
    onChoose(next.id);
    document.getElementById(`tab-${next.id}`)?.focus();
  };
  return html`<div class="tabs" role="tablist" aria-label=${label} onKeyDown=${move}>
    ${tabs.map(
      (tab) => html`<button
        type="button"
        role="tab"
        id=${`tab-${tab.id}`}
        aria-selected=${tab.id === current}
        tabindex=${tab.id === current ? 0 : -1}
        onClick=${() => onChoose(tab.id)}
      >
        ${tab.label}
      </button>`,
    )}
  </div>`;
}

/** Which split's figures are shown. @param {{split: string, onChoose: (split: string) => void}} props val or test */
export function SplitSwitch({ split, onChoose }) {
  return html`<div class="segments" role="group" aria-label=${t("metrics.split")}>
    ${["val", "test"].map((one) => html`<button type="button" aria-pressed=${one === split} onClick=${() => onChoose(one)}>${t(`split.${one}`)}</button>`)}
  </div>`;
}

/** A number with its name. @param {{label: any, value: any, help?: any, detail?: any, tone?: string}} props */
export function Figure({ label, value, help, detail, tone = "" }) {
  return html`<div class=${`figure ${tone}`}>
    <div class="row label"><span>${label}</span>${help && html`<${Help} about=${label} text=${help} />`}</div>
    <div class="value number">${value}</div>
    ${detail && html`<div class="muted small number">${detail}</div>`}
  </div>`;
}

/** @param {{shown: number, move: (value: number) => void}} props */
export function Threshold({ shown, move }) {
  return html`<label class="threshold">
    <span>${t("metrics.threshold")}</span>
    <input type="range" min="0" max="1" step="0.01" value=${shown} onInput=${(/** @type {any} */ event) => move(Number(event.target.value))} />
    <output class="number">${percent(shown, 0)}</output>
  </label>`;
}
