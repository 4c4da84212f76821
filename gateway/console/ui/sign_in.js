// Signing in: instead of every page while nobody is, and above it where the session has ended.
import { html } from "../vendor/preact.js";
import { get } from "../api/http.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { useLoad } from "../state/load.js";
import { Icon } from "./icons.js";
import { Button, Card } from "./parts.js";

/** The ways in: by the issuer of the organisation, if there is one, and by the command line. @param {any} props */
function Ways({ onRetry, inNewTab = false }) {
  const options = useLoad((signal) => get("/login/options", {}, signal), []);
  const issuer = options.data?.oidc;
  return html`
    ${issuer && html`<div><a class="button primary" href=${issuer.path} target=${inNewTab ? "_blank" : undefined} rel="noopener">${t("signIn.oidc", { name: issuer.name })}</a></div>`}
    <p>${t(issuer ? "signIn.orCommand" : "signIn.command")}</p>
    <pre class="command" tabindex="0">detflow open</pre>
    <div class="row"><${Button} icon="restore" onClick=${onRetry}>${t("signIn.retry")}<//></div>
  `;
}

/** @param {{onRetry: () => void}} props */
export function SignIn({ onRetry }) {
  return html`<div class="page sign-in">
    <${Card}>
      <h1>${t("signIn.title")}</h1>
      <${Ways} onRetry=${onRetry} />
      <p class="muted small">${t("signIn.help")}</p>
    <//>
  </div>`;
}

/** @param {{onRetry: () => void}} props */
export function Ended({ onRetry }) {
  return html`<section class="banner stack-small" role="alert">
    <div class="row"><${Icon} name="warning" /><strong>${t("signIn.ended")}</strong></div>
    <${Ways} onRetry=${onRetry} inNewTab />
  </section>`;
}
