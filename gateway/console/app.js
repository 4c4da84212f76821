// The console: the frame around every page, and which page a path shows.
import { html, render, useEffect } from "./vendor/preact.js";
import { match, path } from "./router.js";
import { chooseTheme, language, theme } from "./state/preferences.js";
import { said } from "./state/status.js";
import { changeLanguage, t } from "./i18n/texts.js";
import { useLoad } from "./state/load.js";
import { get } from "./api/http.js";
import { Empty, Skeleton } from "./ui/parts.js";

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

function App() {
  const found = find(path.value);
  const project = found?.values.project;
  return html`
    <a class="skip" href="#content">${t("nav.skip")}</a>
    <${Header} project=${project} />
    <main id="content" tabindex="-1">
      ${found ? html`<${Page} load=${found.load} values=${found.values} />` : html`<${Empty} text=${t("error.noPage")}><a href="/projects">${t("nav.projects")}</a><//>`}
    </main>
    <div class="visually-hidden" role="status" aria-live="polite">${said.value}</div>
  `;
}

/** @param {{load: () => Promise<any>, values: Record<string, string>}} props */
function Page({ load, values }) {
  const module = useLoad(load, [String(load)]);
  if (module.error) throw module.error;
  if (!module.data) return html`<${Skeleton} lines=${5} />`;
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
      ]
    : [["/projects", "nav.projects"]];
  return html`<header class="top">
    <a class="brand" href="/projects"><img src="/console/icon.svg" alt="" width="22" height="22" />detflow</a>
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
    </div>
  </header>`;
}

/** @param {{project: string}} props */
function ProjectName({ project }) {
  const state = useLoad((signal) => get(`/v1/projects/${project}`, {}, signal), [project]);
  useEffect(() => {
    document.title = state.data ? `${state.data.displayName} · detflow` : "detflow";
  }, [state.data]);
  return html`<a class="project" href="/projects" title=${t("nav.projects")}>${state.data?.displayName ?? project}</a>`;
}

render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));
