// The console: the frame around every page, and which page a path shows.
import { html, render, useEffect, useState } from "./vendor/preact.js";
import { match, path } from "./router.js";
import { chooseTheme, language, theme } from "./state/preferences.js";
import { enter, principal, role, session } from "./state/session.js";
import { renames, said } from "./state/status.js";
import { changeLanguage, t } from "./i18n/texts.js";
import { useLoad } from "./state/load.js";
import { get } from "./api/http.js";
import { Later } from "./ui/later.js";
import { Empty, Problem, Skeleton } from "./ui/parts.js";

/** Pages by path; a page is loaded when it is first shown. */
const PAGES = [
  ["/", () => import("./pages/projects.js")],
  ["/projects", () => import("./pages/projects.js")],
  ["/p/:project/datasets", () => import("./pages/datasets.js")],
  ["/p/:project/datasets/:dataset", () => import("./pages/datasets.js")],
  ["/p/:project/versions/new", () => import("./pages/new_version.js")],
  ["/p/:project/train", () => import("./pages/train.js")],
  ["/p/:project/train/:version", () => import("./pages/train.js")],
  ["/p/:project/train/:version/metrics", () => import("./pages/train.js")],
  ["/p/:project/evaluate", () => import("./pages/evaluate.js")],
  ["/p/:project/evaluate/:version", () => import("./pages/evaluate.js")],
  ["/p/:project/compare", () => import("./pages/compare.js")],
  ["/p/:project/settings", () => import("./pages/settings.js")],
  ["/p/:project/settings/:tab", () => import("./pages/settings.js")],
  ["/system", () => import("./pages/system.js")],
];

/** @param {string} text @returns {{load: () => Promise<any>, values: Record<string, string>} | null} */
function find(text) {
  for (const [pattern, load] of PAGES) {
    const values = match(/** @type {string} */ (pattern), text);
    if (values) return { load: /** @type {any} */ (load), values };
  }
  return null;
}

const signIn = () => import("./ui/sign_in.js");

function App() {
  const found = find(path.value);
  const project = found?.values.project;
  const [error, setError] = useState(/** @type {any} */ (null));
  const ask = () => {
    setError(null);
    get("/v1/principal").then(enter, (caught) => setError(caught.code === 401 ? null : caught));
  };
  useEffect(() => {
    ask();
    // Who signs in does so in another tab, or has just come back from there.
    const look = () => document.hidden || session.peek() === "in" || ask();
    document.addEventListener("visibilitychange", look);
    return () => document.removeEventListener("visibilitychange", look);
  }, []);
  const known = principal.value;
  return html`
    <a class="skip" href="#content">${t("nav.skip")}</a>
    <${Header} project=${known && project} />
    ${session.value === "ended" && html`<${Later} load=${signIn} name="Ended" onRetry=${ask} />`}
    <main id="content" tabindex="-1">
      ${session.value === "out"
        ? html`<${Later} load=${signIn} name="SignIn" onRetry=${ask} />`
        : !known
          ? html`<div class="page">${error ? html`<${Problem} error=${error} onRetry=${ask} />` : html`<${Skeleton} lines=${5} />`}</div>`
          : found
            ? html`<${Page} load=${found.load} values=${found.values} />`
            : html`<${Empty} text=${t("error.noPage")}><a href="/projects">${t("nav.projects")}</a><//>`}
    </main>
    <div class="visually-hidden" role="status" aria-live="polite">${said.value}</div>
  `;
}

/** @param {{load: () => Promise<any>, values: Record<string, string>}} props */
function Page({ load, values }) {
  const module = useLoad(load, [String(load)]);
  if (module.error) throw module.error;
  if (!module.data) return html`<div class="page"><${Skeleton} lines=${5} /></div>`;
  return html`<${module.data.Page} ...${values} />`;
}

/** @param {{project?: string}} props */
function Header({ project }) {
  const links = project
    ? [
        [`/p/${project}/datasets`, "nav.data"],
        [`/p/${project}/train`, "nav.train"],
        [`/p/${project}/evaluate`, "nav.evaluate"],
        [`/p/${project}/compare`, "nav.compare"],
        [`/p/${project}/settings`, "nav.settings"],
      ]
    : [["/projects", "nav.projects"]];
  return html`<header class="top">
    <a class="brand" href="/projects" aria-label="detflow"><img src="/console/icon.svg" alt="" width="22" height="22" /><span>detflow</span></a>
    ${project && html`<${ProjectName} project=${project} />`}
    <nav aria-label=${t("nav.label")}>
      ${links.map(([to, key]) => html`<a href=${to} aria-current=${path.value.startsWith(to) ? "page" : undefined}>${t(key)}</a>`)}
      <a href="/system" aria-current=${path.value === "/system" ? "page" : undefined}>${t("nav.system")}</a>
    </nav>
    <div class="row">
      <label class="visually-hidden" for="theme">${t("theme.label")}</label>
      <select id="theme" value=${theme.value} onChange=${(/** @type {any} */ event) => chooseTheme(event.target.value)}>
        ${["auto", "light", "dark"].map((one) => html`<option value=${one}>${t(`theme.${one}`)}</option>`)}
      </select>
      <button
        type="button"
        class="button plain"
        lang=${language.value === "ko" ? "en" : "ko"}
        onClick=${() => changeLanguage(language.value === "ko" ? "en" : "ko")}
      >
        ${language.value === "ko" ? "English" : "한국어"}
      </button>
      ${principal.value && html`<${Account} />`}
    </div>
  </header>`;
}

/** Who is signed in, with which role here, and the way out. */
function Account() {
  const who = principal.value;
  const has = role();
  return html`<details class="account">
    <summary class="button plain" aria-label=${t("account.label", { name: who.displayName })}>${who.displayName}</summary>
    <div class="help-text stack-small">
      <strong class="path">${who.displayName}</strong>
      ${has && html`<span class="muted small">${t("account.role", { role: t(`role.${has}`) })}</span>`}
      <form method="post" action="/logout"><button class="button plain">${t("account.signOut")}</button></form>
    </div>
  </details>`;
}

/** @param {{project: string}} props */
function ProjectName({ project }) {
  const state = useLoad((signal) => get(`/v1/projects/${project}`, {}, signal), [project, renames.value]);
  useEffect(() => {
    document.title = state.data ? `${state.data.displayName} · detflow` : "detflow";
  }, [state.data]);
  return html`<a class="project" href="/projects" title=${t("nav.projects")}>${state.data?.displayName ?? project}</a>`;
}

// What the page needs is fetched while it is asked who is signed in; if that fails, the page says so.
find(path.peek())?.load().catch(() => {});

// What a question mark or the account opens is closed by Escape, and by a click elsewhere.
for (const type of ["click", "keydown"]) {
  document.addEventListener(type, (event) => {
    const isEscape = /** @type {KeyboardEvent} */ (event).key === "Escape";
    if (type === "keydown" && !isEscape) return;
    for (const one of document.querySelectorAll(".help[open], .account[open]")) {
      if (isEscape || !one.contains(/** @type {Node} */ (event.target))) one.removeAttribute("open");
    }
  });
}

render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));
