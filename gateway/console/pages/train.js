// The founding page: versions, and for the chosen one everything from preprocessing to the model's figures.
import { html, useEffect, useState } from "../vendor/preact.js";
import { call, get, newRequestId } from "../api/http.js";
import { go, path } from "../router.js";
import { t } from "../i18n/texts.js";
import { idOf } from "../i18n/format.js";
import { may } from "../state/session.js";
import { say } from "../state/status.js";
import { TONES, isLive, useVersions } from "../state/versions.js";
import { useTraining } from "../state/training.js";
import { Icon } from "../ui/icons.js";
import { Later } from "../ui/later.js";
import { Button, Chip, Empty, Failed, Problem, Skeleton } from "../ui/parts.js";
import { ProgressCard } from "../ui/progress_card.js";
import { AugmentationCard, SplitCard } from "../ui/version_cards.js";
import { HyperparametersCard, useHyperparameters } from "../ui/hyperparameters.js";
import { LossChart } from "../ui/loss_chart.js";

/** @param {{project: string, version?: string}} props */
export function Page({ project, version }) {
  const [linked, setLinked] = useState(true);
  const [busyStream, setBusyStream] = useState(false);
  const { versions, error, reload, put } = useVersions(project, !busyStream, setLinked);
  const chosen = versions?.find((one) => idOf(one.name) === version);

  // Without a choice the newest one is shown.
  useEffect(() => {
    if (!version && versions?.length) go(`/p/${project}/train/${idOf(versions[0].name)}`, { replace: true });
  }, [version, versions]);

  return html`<div class="split-page">
    <${VersionList} project=${project} versions=${versions} current=${version} onChange=${reload} />
    <div class="page stack">
      ${!chosen && html`<h1>${t("nav.train")}</h1>`}
      ${error && html`<${Problem} error=${error} onRetry=${reload} />`}
      ${!versions && !error && html`<${Skeleton} lines=${6} />`}
      ${versions && !versions.length &&
      html`<${Empty} text=${t("versions.empty")}>
        ${may("EDITOR") && html`<a class="button primary" href=${`/p/${project}/versions/new`}>${t("versions.create")}</a>`}
      <//>`}
      ${versions && versions.length > 0 && version && !chosen && html`<${Empty} text=${t("versions.gone")} />`}
      ${chosen &&
      html`<${VersionView}
        key=${chosen.name}
        project=${project}
        version=${chosen}
        onChange=${reload}
        onPut=${put}
        onStream=${setBusyStream}
        linked=${linked}
        onLink=${setLinked}
      />`}
    </div>
  </div>`;
}

/** @param {{project: string, versions: any[] | undefined, current?: string, onChange: () => void}} props */
function VersionList({ project, versions, current, onChange }) {
  const [trash, showTrash] = useState(false);
  return html`<aside class="versions" aria-label=${t("versions.title")}>
    <div class="row spread">
      <h2>${t("versions.title")}</h2>
      <div class="row">
        <${Button} kind="quiet" icon="restore" label=${t("trash.open")} onClick=${() => showTrash(true)} />
        ${may("EDITOR") &&
        html`<a class="button quiet only-icon" href=${`/p/${project}/versions/new`} aria-label=${t("versions.create")} title=${t("versions.create")}>
          <${Icon} name="plus" />
        </a>`}
      </div>
    </div>
    <ul>
      ${(versions ?? []).map(
        (one) => html`<li key=${one.name}>
          <a href=${`/p/${project}/train/${idOf(one.name)}`} aria-current=${idOf(one.name) === current ? "page" : undefined}>
            <span class="name">${one.displayName}</span>
            <span class=${`state small ${TONES[/** @type {keyof typeof TONES} */ (one.state)]}`}>
              <${Icon} name=${iconOf(one.state)} size=${14} />${t(`state.${one.state}`)}
            </span>
          </a>
        </li>`,
      )}
    </ul>
    ${trash && html`<${Later} load=${() => import("./trash_dialog.js")} name="TrashDialog" project=${project} onChange=${onChange} onClose=${() => showTrash(false)} />`}
  </aside>`;
}

/** @param {string} state */
function iconOf(state) {
  return (
    { PREPROCESSING: "wait", READY: "check", QUEUED: "wait", PROVISIONING: "gear", TRAINING: "play", EVALUATING: "play", COMPLETED: "check", FAILED: "warning", STOPPED: "stop", PAUSED: "pause" }[state] ?? "wait"
  );
}

/** @param {any} props */
function VersionView({ project, version, onChange, onPut, onStream, linked, onLink }) {
  const live = isLive(version.state);
  const preprocessing = version.state === "PREPROCESSING";
  // What is at rest is read by the same stream: it ends by itself.
  const { live: training, error } = useTraining(version.training, onLink, onChange);
  const following = preprocessing || live;
  useEffect(() => {
    onStream(following);
    return () => onStream(false);
  }, [following]);
  useEffect(() => say(`${version.displayName}: ${t(`state.${version.state}`)}`), [version.state]);

  const hyperparameters = useHyperparameters(training?.training);
  const [starting, setStarting] = useState(false);
  const [startError, setStartError] = useState(/** @type {any} */ (null));
  const start = async () => {
    setStarting(true);
    setStartError(null);
    try {
      await call("POST", `/v1/${version.name}/trainings`, {
        query: { requestId: newRequestId() },
        body: hyperparameters.body(),
      });
      onPut(await get(`/v1/${version.name}`));
      onChange();
    } catch (caught) {
      setStartError(caught);
    }
    setStarting(false);
  };

  const [exporting, setExporting] = useState(false);
  const isNew = !version.training;
  const state = training?.training?.state;
  return html`
    <${TitleBar} project=${project} version=${version} onPut=${onPut} onChange=${onChange} linked=${linked}>
      ${training?.training?.weights && !live &&
      html`<${Button} icon="download" needs="EDITOR" onClick=${() => setExporting(true)}>${t("train.export")}<//>
        <a class="button plain" href=${`/p/${project}/evaluate/${idOf(version.name)}`}>${t("train.evaluate")}</a>`}
      ${isNew &&
      html`<${Button} kind="primary" icon="play" needs="EDITOR" disabled=${version.state !== "READY"} busy=${starting} onClick=${start}>
        ${t(preprocessing ? "train.preprocessing" : "train.start")}
      <//>`}
    <//>
    ${startError && html`<${Problem} error=${startError} />`}
    ${preprocessing && html`<${Later} load=${() => import("../ui/preprocessing_card.js")} name="PreprocessingCard" version=${version} onLink=${onLink} onChange=${onChange} />`}
    ${version.state === "FAILED" && isNew && version.failure && html`<${Failed} failure=${version.failure} />`}
    ${error && html`<${Problem} error=${error} />`}
    ${version.training && html`<${ProgressCard} live=${training} onChange=${onChange} />`}
    ${state === "SUCCEEDED" || state === "STOPPED"
      ? html`<${Later} load=${() => import("../ui/metrics_card.js")} name="MetricsCard" training=${version.training} onMore=${() => go(`/p/${project}/train/${idOf(version.name)}/metrics`)} />`
      : null}
    ${training && Object.keys(training.series).length > 0 && html`<${LossChart} series=${training.series} />`}
    <div class="columns">
      <${SplitCard} version=${version} />
      <${AugmentationCard} version=${version} />
    </div>
    <${HyperparametersCard} values=${hyperparameters} readOnly=${!isNew || !may("EDITOR")} project=${project} training=${training?.training} />
    ${exporting && html`<${Later} load=${() => import("./export_dialog.js")} name="ExportDialog" training=${version.training} onClose=${() => setExporting(false)} />`}
    ${path.value.endsWith("/metrics") && version.training &&
    html`<${Later}
      load=${() => import("./metrics.js")}
      name="MetricsDialog"
      training=${version.training}
      series=${training?.series}
      onClose=${() => go(`/p/${project}/train/${idOf(version.name)}`, { replace: true })}
    />`}
  `;
}

const loadDialogs = () => import("./version_dialogs.js");

/** @param {any} props */
function TitleBar({ project, version, onPut, onChange, linked, children }) {
  const [dialog, setDialog] = useState("");
  return html`<div class="row spread title-bar">
    <div class="row">
      <h1>${version.displayName}</h1>
      ${may("EDITOR") &&
      html`<${Button} kind="quiet" icon="pen" label=${t("version.rename")} onClick=${() => setDialog("rename")} />
        <${Button} kind="quiet" icon="bin" label=${t("version.delete")} onClick=${() => setDialog("delete")} />`}
      <${Chip} tone=${TONES[/** @type {keyof typeof TONES} */ (version.state)]}>${t(`state.${version.state}`)}<//>
      ${!linked && html`<${Chip} tone="warn">${t("link.lost")}<//>`}
    </div>
    <div class="row">${children}</div>
    ${dialog === "rename" && html`<${Later} load=${loadDialogs} name="Rename" version=${version} onPut=${onPut} onClose=${() => setDialog("")} />`}
    ${dialog === "delete" && html`<${Later} load=${loadDialogs} name="Delete" project=${project} version=${version} onChange=${onChange} onClose=${() => setDialog("")} />`}
  </div>`;
}
