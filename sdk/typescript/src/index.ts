/** Client of a detflow gateway. */
import { createRegistry } from "@bufbuild/protobuf";
import { createClient as connect, type Interceptor } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";

import { translate } from "./errors.js";
import { AccessService } from "./gen/detflow/v1/access_pb.js";
import { AnalysisService } from "./gen/detflow/v1/analysis_pb.js";
import { ComparisonService } from "./gen/detflow/v1/comparison_pb.js";
import { DatasetService } from "./gen/detflow/v1/dataset_pb.js";
import { ExportService } from "./gen/detflow/v1/export_pb.js";
import { InferenceService } from "./gen/detflow/v1/inference_pb.js";
import { MetricsService } from "./gen/detflow/v1/metrics_pb.js";
import { PredictionService } from "./gen/detflow/v1/prediction_pb.js";
import { PreprocessService } from "./gen/detflow/v1/preprocess_pb.js";
import { ProjectService } from "./gen/detflow/v1/project_pb.js";
import { ReportService } from "./gen/detflow/v1/report_pb.js";
import { TrainerService } from "./gen/detflow/v1/trainer_pb.js";
import { VersionService } from "./gen/detflow/v1/version_pb.js";
import { WebhookService } from "./gen/detflow/v1/webhook_pb.js";
import { WeightsService } from "./gen/detflow/v1/weights_pb.js";
import { file_google_rpc_error_details } from "./gen/google/rpc/error_details_pb.js";
import { bearer, type Token } from "./token.js";
import { watch, type WatchOptions } from "./watch.js";

export { Code } from "@connectrpc/connect";
export { DetflowError, type Violation } from "./errors.js";
export type { Token } from "./token.js";
export { watch, type Watched, type WatchOptions } from "./watch.js";

/** How to reach a gateway. */
export interface ClientOptions {
  /** E.g. `http://127.0.0.1:7100`. */
  baseUrl: string;
  /**
   * An API key that says who is calling, or what gives one before every call. Pages of the gateway's
   * own need none: browsers that are signed in send their cookie.
   */
  token?: Token;
  /** Whether the token may go over http:// to another machine. */
  insecure?: boolean;
  /** Used in place of the global fetch. */
  fetch?: typeof globalThis.fetch;
  /** Whether messages are JSON, to be read in a network log, rather than binary. */
  json?: boolean;
  /** Around every call, e.g. to add a header. */
  interceptors?: Interceptor[];
}

/** Typed clients of all services, and the watches. */
export type Client = ReturnType<typeof createClient>;

/** Makes a client; nothing is sent yet. */
export function createClient(options: ClientOptions) {
  const { baseUrl, token, insecure = false, fetch, json = false, interceptors = [] } = options;
  const transport = createConnectTransport({
    baseUrl,
    useBinaryFormat: !json,
    // Stored failures hold details of any type.
    jsonOptions: { registry: createRegistry(file_google_rpc_error_details), ignoreUnknownFields: true },
    interceptors: [translate, ...(token ? [bearer(token, baseUrl, insecure)] : []), ...interceptors],
    ...(fetch && { fetch }),
  });
  const versions = connect(VersionService, transport);
  const datasets = connect(DatasetService, transport);
  const preprocess = connect(PreprocessService, transport);
  const trainer = connect(TrainerService, transport);
  const exports = connect(ExportService, transport);
  const metrics = connect(MetricsService, transport);
  return {
    projects: connect(ProjectService, transport),
    versions,
    datasets,
    preprocess,
    trainer,
    exports,
    weights: connect(WeightsService, transport),
    metrics,
    analysis: connect(AnalysisService, transport),
    inference: connect(InferenceService, transport),
    predictions: connect(PredictionService, transport),
    comparisons: connect(ComparisonService, transport),
    reports: connect(ReportService, transport),
    webhooks: connect(WebhookService, transport),
    access: connect(AccessService, transport),

    /** Watches that survive a broken connection; see `watch`. */
    watch: {
      /** A training: its states, progress, epochs and log lines, until its final state. */
      training: (name: string, options?: WatchOptions) =>
        watch((cursor, call) => trainer.watchTraining({ name, cursor }, call), options),
      /** The metrics of a training as they come. */
      metrics: (training: string, options?: WatchOptions) =>
        watch((cursor, call) => metrics.watchMetrics({ training, cursor }, call), options),
      /** The versions of a project, as they are and after each change. */
      versions: (parent: string, options?: WatchOptions) =>
        watch((cursor, call) => versions.watchVersions({ parent, cursor }, call), options),
      /** The import of a dataset. */
      dataset: (name: string, options?: WatchOptions) =>
        watch((cursor, call) => datasets.watchDataset({ name, cursor }, call), options),
      /** The preprocessing of a version. */
      preprocessing: (version: string, options?: WatchOptions) =>
        watch((cursor, call) => preprocess.watchPreprocessing({ version, cursor }, call), options),
      /** An export until it is ready. */
      export: (name: string, options?: WatchOptions) =>
        watch((cursor, call) => exports.watchExport({ name, cursor }, call), options),
    },
  };
}
